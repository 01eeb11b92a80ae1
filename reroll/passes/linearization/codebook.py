"""A codebook for queries and keys: which of a number of buckets of keys each belongs to.

A head that copies looks for one key among thousands by a few of its directions, which gradient
descent hardly finds. They can be computed. With E the mean over pairs of a query q and a key k that
is out of the window, weighted by the attention from one to the other, k whitened, and both without
their part along the mean,

    V [d, n]     the n directions of a key that its queries say most of: the largest eigenvectors of
                 the sum over the query heads of E[k q^T] E[q q^T]^-1 E[q k^T]
    A [d, n]     for each query head E[q q^T]^-1 E[q k^T] V, the regression of V^T k on the query,
                 scaled to a mean square of 1
    R [n, size]  the centroids of the keys' V^T k on the unit sphere: each is a bucket

and a key's features are softmax(s R^T V^T k), a query's softmax(s R^T A^T q): canonical
correlations (Hotelling, 1936, Biometrika 28) between what asks and what answers, and spherical
k-means (Dhillon and Modha, 2001, Machine Learning 42). Keys that are known by their buckets are the
idea of Transformer-VQ (arXiv 2309.16354).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from reroll.errors import PassError
from reroll.passes.linearization.observed import Reach, Seen

# directions of a key that count, and the sharpness s of a bucket
DIRECTIONS, SHARPNESS = 16, 10.0
# how much of a mean eigenvalue is added to all of them
RIDGE = 0.02
ROUNDS = 8

Side = Literal["q", "k"]
SIDES: tuple[Side, Side] = ("q", "k")


@dataclass(frozen=True)
class Codebook:
    """The projections of one layer: `queries` [heads, d, size] and `keys` [kv_heads, d, size]."""

    queries: Tensor
    keys: Tensor

    @property
    def size(self) -> int:
        """How many buckets there are."""
        return self.keys.shape[-1]

    def part(self, side: Side) -> Tensor:
        """The projection of queries or keys."""
        return self.queries if side == "q" else self.keys


@dataclass(frozen=True)
class _Moments:
    """Sums over the tokens that one layer has seen, each query as often as it attends to the far.

    mass [heads], q [heads, d], qq and qk [heads, d, d], and all keys [kv_heads, tokens, d].
    """

    mass: Tensor
    q: Tensor
    qq: Tensor
    qk: Tensor
    keys: Tensor

    @classmethod
    def of(cls, seen: Seen, reach: Reach) -> _Moments:
        """Those of one input."""
        assert seen.read is not None
        q, k = (x.double() for x in seen.read)
        hidden = reach.ages(q.shape[2], seen.causal) < 0
        far = seen.weights().masked_fill(hidden, 0.0).double()
        asks, repeated = far.sum(-1), k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        return cls(
            asks.sum((0, 2)),
            torch.einsum("bht,bhtd->hd", asks, q),
            torch.einsum("bht,bhtd,bhte->hde", asks, q, q),
            torch.einsum("bhtd,bhts,bhse->hde", q, far, repeated),
            k.transpose(0, 1).flatten(1, 2),
        )

    def plus(self, other: _Moments) -> _Moments:
        """The sums over both inputs."""
        return _Moments(
            self.mass + other.mass,
            self.q + other.q,
            self.qq + other.qq,
            self.qk + other.qk,
            torch.cat((self.keys, other.keys), 1),
        )


def measure_codebooks(seen: Iterable[Seen], reach: Reach, size: int) -> dict[int, Codebook]:
    """The codebook of every layer, with `size` buckets, from attentions seen on a text.

    Raises PassError if the text has fewer tokens than that.
    """
    moments: dict[int, _Moments] = {}
    for each in seen:
        new, old = _Moments.of(each, reach), moments.get(each.number)
        moments[each.number] = new if old is None else old.plus(new)
    for sums in moments.values():
        if sums.keys.shape[1] < size:
            raise PassError(
                f"{sums.keys.shape[1]} tokens of text cannot be sorted into {size} buckets",
                where="pass linearize, option features",
                hint="give more text, raise samples, or lower features",
            )
    return {number: _codebook(sums, size) for number, sums in moments.items()}


def _codebook(sums: _Moments, size: int) -> Codebook:
    mass = sums.mass.clamp(min=1e-6)
    by_query, by_key = [], []
    # the query heads that share keys
    for keys, heads in zip(sums.keys, torch.arange(len(mass)).chunk(len(sums.keys)), strict=True):
        drop = _without(keys.mean(0))
        white = drop @ _root(_ridged(drop @ (keys.T @ keys / len(keys)) @ drop))
        drops = torch.stack([_without(mean) for mean in sums.q[heads]])
        # E[q q^T] and E[q k^T] of each query head
        squares = drops @ (sums.qq[heads] / mass[heads, None, None]) @ drops
        products = drops @ (sums.qk[heads] / mass[heads, None, None]) @ white
        regressions = torch.linalg.solve(torch.stack([_ridged(s) for s in squares]), products)
        told = (mass[heads, None, None] * (products.mT @ regressions)).sum(0)
        directions = torch.linalg.eigh(told).eigenvectors.flip(1)[:, :DIRECTIONS]
        asked, answered = drops @ regressions @ directions, (white @ directions).float()
        size_of = torch.einsum("hdn,hde,hen->h", asked, squares, asked) / directions.shape[1]
        asked = asked / size_of.clamp(min=1e-12).sqrt()[:, None, None]
        centroids = _centroids(keys.float() @ answered, size) * SHARPNESS
        by_query.append(asked.float() @ centroids)
        by_key.append(answered @ centroids)
    return Codebook(torch.cat(by_query), torch.stack(by_key))


def _without(direction: Tensor) -> Tensor:
    """The projection [d, d] on what is orthogonal to a direction [d]."""
    unit = F.normalize(direction, dim=0)
    rest: Tensor = torch.eye(len(unit), dtype=unit.dtype) - torch.outer(unit, unit)
    return rest


def _ridged(square: Tensor) -> Tensor:
    """A matrix of second moments with a ridge."""
    eye = torch.eye(len(square), dtype=square.dtype)
    return square + RIDGE * square.trace().clamp(min=1e-12) / len(square) * eye


def _root(square: Tensor) -> Tensor:
    """The inverse of a matrix's root."""
    values, vectors = torch.linalg.eigh(square)
    root: Tensor = vectors @ torch.diag(values.rsqrt()) @ vectors.mT
    return root


def _centroids(points: Tensor, size: int) -> Tensor:
    """Unit vectors [n, size] that points [count, n] cluster around, by their angle."""
    points = F.normalize(points, dim=-1)
    chosen = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))[:size]
    centroids = points[chosen]
    for _ in range(ROUNDS):
        nearest = (points @ centroids.T).argmax(-1)
        sums = torch.zeros_like(centroids).index_add_(0, nearest, points)
        met = torch.zeros(size).index_add_(0, nearest, torch.ones(len(points)))
        centroids = torch.where(met[:, None] > 0, F.normalize(sums, dim=-1), centroids)
    return centroids.mT
