"""Products of decays between the tokens of a stretch, computed from sums of their logs.

Token i of a stretch reads what token j <= i wrote times exp(G_i - G_j). G_i is the sum of log
decays up to and including token i. Differences are taken before the exponential, so nothing leaves
the range of floating point, whatever the decays are. Only `FactoredDecay` splits the product into
two factors, and therefore needs a lower bound on log decays.

With a `tree`, tokens of a stretch are its nodes: log decays are summed along the path of each, and
it reads what its ancestors wrote. There is no end of such a stretch.

Shapes: k [..., time, d], q [..., groups, time, d], log decays [..., time] or [..., time, d].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from reroll.mixers.trees import Tree

# largest |sum of log decays| over a chunk whose two factors, anchored in the middle of its range,
# fit fp32 and bf16
REACH = 160.0
# tokens of a row in `running_sums`
ROW = 8


def bounded_size(size: int, floor: float) -> int:
    """Return the largest power of two up to `size` for which factored decays stay in range."""
    while size > 1 and size * -floor > REACH:
        size = 1 << ((size - 1).bit_length() - 1)
    return size


class Decay(ABC):
    """Decays over a stretch of tokens; results have the dtype of the log decays."""

    @abstractmethod
    def scores(self, q: Tensor, k: Tensor, diagonal: int = 0) -> Tensor:
        """Compute q_i . k_j times the decay between tokens j and i: [..., groups, time, time].

        Zero where j > i + diagonal; with `diagonal` -1 a token's own key is left out.
        """

    @abstractmethod
    def from_start(self, x: Tensor) -> Tensor:
        """Multiply `x` [..., time, d] by the decay from the start of the stretch to each token."""

    @abstractmethod
    def to_end(self, k: Tensor) -> Tensor:
        """Multiply `k` [..., time, d] by the decay from each token to the end of the stretch."""

    @property
    @abstractmethod
    def total(self) -> Tensor:
        """Sum of log decays over the stretch: [..., d or 1]."""


# the decay over a stretch, from its log decays, and the tree if it is one
MakeDecay: TypeAlias = Callable[..., Decay]


class NoDecay(Decay):
    """No decay; `like` [..., time] gives the number of tokens."""

    def __init__(self, like: Tensor, tree: Tree | None = None) -> None:
        self.like, self.tree = like, tree

    def scores(self, q: Tensor, k: Tensor, diagonal: int = 0) -> Tensor:
        pairs = products(q, k.mT)
        return pairs.tril(diagonal) if self.tree is None else pairs * self.tree.seen(diagonal)

    def from_start(self, x: Tensor) -> Tensor:
        return x

    def to_end(self, k: Tensor) -> Tensor:
        return k

    @property
    def total(self) -> Tensor:
        return torch.zeros_like(self.like[..., :1])


class HeadDecay(Decay):
    """One decay for each head: log decays [..., time]."""

    def __init__(self, log_decay: Tensor, tree: Tree | None = None) -> None:
        self.tree = tree
        self.sums = (
            log_decay.cumsum(-1) if tree is None else tree.sums(log_decay[..., None])[..., 0]
        )

    def scores(self, q: Tensor, k: Tensor, diagonal: int = 0) -> Tensor:
        between = self.sums[..., :, None] - self.sums[..., None, :]
        fade = between.masked_fill(~_lower(between, diagonal, self.tree), -torch.inf).exp()
        return products(q, k.mT) * fade.unsqueeze(-3)

    def from_start(self, x: Tensor) -> Tensor:
        return x * _beside(self.sums[..., None].exp(), x)

    def to_end(self, k: Tensor) -> Tensor:
        return k * (self.sums[..., -1:] - self.sums).exp()[..., None]

    @property
    def total(self) -> Tensor:
        return self.sums[..., -1:]


class ChannelDecay(Decay):
    """One decay for each channel of the keys: log decays [..., time, d], all pairs at once."""

    def __init__(self, log_decay: Tensor, tree: Tree | None = None) -> None:
        self.tree = tree
        self.sums = running_sums(log_decay) if tree is None else tree.sums(log_decay)

    def scores(self, q: Tensor, k: Tensor, diagonal: int = 0) -> Tensor:
        return torch.einsum("...gid,...jd,...ijd->...gij", q, k, self.between(diagonal))

    def between(self, diagonal: int = 0) -> Tensor:
        """Compute the decay of each channel between tokens j and i: [..., time, time, d]."""
        sums = self.sums[..., :, None, :] - self.sums[..., None, :, :]
        causal = _lower(sums[..., 0], diagonal, self.tree)
        return sums.masked_fill(~causal[..., None], -torch.inf).exp()

    def from_start(self, x: Tensor) -> Tensor:
        return x * _beside(self.sums.exp(), x)

    def to_end(self, k: Tensor) -> Tensor:
        return k * (self.sums[..., -1:, :] - self.sums).exp()

    @property
    def total(self) -> Tensor:
        return self.sums[..., -1, :]


class FactoredDecay(ChannelDecay):
    """One decay for each channel, in one product: exp(G_i - G_j) = exp(G_i - a) exp(a - G_j).

    The anchor a lies in the middle of the range of G, so that each factor spans half of it. Over
    `bounded_size` tokens both factors are in range, and so is their product for every j <= i. The
    same factors give the decays from the start and to the end, which saves half of the
    exponentials.
    """

    def __init__(self, log_decay: Tensor) -> None:
        super().__init__(log_decay)
        last = self.sums[..., -1:, :]
        # nothing depends on the anchor, so there is no gradient through it
        anchor = 0.5 * last.detach()
        anchored = self.sums - anchor
        self.rise, self.fall = anchored.exp(), (-anchored).exp()
        self.start, self.end = anchor.exp(), (last - anchor).exp()

    def scores(self, q: Tensor, k: Tensor, diagonal: int = 0) -> Tensor:
        dtype = k.dtype
        all_pairs = products((q * self.rise.unsqueeze(-3)).to(dtype), (k * self.fall).to(dtype).mT)
        # entries above the diagonal may have overflowed; they are masked here
        return all_pairs.masked_fill(~_lower(all_pairs[..., 0, :, :], diagonal).unsqueeze(-3), 0.0)

    def from_start(self, x: Tensor) -> Tensor:
        return x * _beside(self.rise * self.start, x)

    def to_end(self, k: Tensor) -> Tensor:
        return k * (self.fall * self.end)


def kept(log_decay: Tensor, k: Tensor) -> Tensor:
    """Return the decay of one token, [..., d or 1], beside its key [..., d]."""
    decay = log_decay.exp()
    return decay if decay.dim() == k.dim() else decay[..., None]


def running_sums(x: Tensor) -> Tensor:
    """Sum `x` [..., time, d] over time, up to and including each token.

    It adds rows of eight tokens as vectors, because `cumsum` along any dimension but the last is
    scalar.
    """
    time = x.shape[-2]
    if time % ROW or time == ROW:
        return x.cumsum(-2)
    rows = torch.unflatten(x, -2, (-1, ROW))
    within = [rows[..., 0, :]]
    for i in range(1, ROW):
        within.append(within[-1] + rows[..., i, :])
    before = running_sums(within[-1]) - within[-1]
    return (torch.stack(within, -2) + before.unsqueeze(-2)).flatten(-3, -2)


def products(q: Tensor, m: Tensor) -> Tensor:
    """Multiply q [..., groups, time, a] by m [..., a, b], with the groups as further rows."""
    return torch.unflatten(q.flatten(-3, -2) @ m, -2, q.shape[-3:-1])


def _beside(factors: Tensor, x: Tensor) -> Tensor:
    """Broadcast factors [..., time, d] to x, which may have groups before its time."""
    return factors if factors.dim() == x.dim() else factors.unsqueeze(-3)


def _lower(square: Tensor, diagonal: int, tree: Tree | None = None) -> Tensor:
    if tree is not None:
        return tree.seen(diagonal)
    # narrow integers, which compile to wider vectors
    at = torch.arange(square.shape[-1], dtype=torch.int32, device=square.device)
    return at[None, :] <= at[:, None] + diagonal
