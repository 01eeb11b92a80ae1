"""Assign each token to the slot whose centroid is nearest to its key.

Slots stand for clusters of a text's keys, before their rotary embedding. The centroids c of one
key-value head come from k-means (Lloyd, 1982, IEEE Trans. Inf. Theory 28). With r the mean squared
distance of a key to the nearest centroid, a token belongs to each slot with the probability

    p = softmax(s (c . k - |c|^2 / 2)),  s = SHARPNESS / r

which is close to 1 for the nearest slot and close to 0 for the others. A slot keeps 1 - p of its
content. So a token overwrites the key and value of the last token of its cluster. Attention over
slots is exact for the tokens that they hold. This is attention with bounded-memory control (Peng et
al., 2022, arXiv 2110.02488) whose control is a clustering. It runs in the recurrence of gated slot
attention (`reroll.mixers.gsa`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from reroll.errors import PassError
from reroll.passes.linearize.linearized_attention import LinearizedAttention, before_rotary
from reroll.rewrite.ir.program import Program
from reroll.rewrite.pipeline.base import Context

# rounds of k-means, and the inverse temperature of the softmax over slots
ROUNDS, SHARPNESS = 8, 64.0


@dataclass(frozen=True)
class Clusters:
    """Key clusters of one layer, one per slot, as a linear layer over keys.

    Up to a constant, log p of a key k is k `weight`^T + `bias`. `weight` is [kv_heads, slots, d_k]
    and `bias` [kv_heads, slots].
    """

    weight: Tensor
    bias: Tensor


def measure_clusters(
    program: Program,
    attentions: Sequence[LinearizedAttention],
    inputs: Sequence[Mapping[str, Tensor]],
    context: Context,
    slots: int,
) -> dict[int, Clusters]:
    """Cluster the keys of every chosen layer; return the clusters by layer number.

    Raises PassError if the inputs have fewer tokens than there are slots.
    """
    owner = {before_rotary(attention.k): attention for attention in attentions}
    keys: dict[int, list[Tensor]] = {}

    def keep(name: str, trip: int | None, node: fx.Node, args: tuple[Any, ...], out: Any) -> None:
        del name, args
        attention = owner.get(node)
        if (
            attention is not None
            and (number := attention.layer.numbers[trip or 0]) in attention.chosen
        ):
            keys.setdefault(number, []).append(out)

    for done, each in enumerate(inputs):
        context.progress(done, len(inputs), "clustering")
        context.outputs(program, each, fast=False, observe=keep)
    return {number: clusters_of(parts, slots) for number, parts in keys.items()}


def clusters_of(keys: Sequence[Tensor], slots: int) -> Clusters:
    """Cluster the keys of one layer, tensors [batch, kv_heads, time, d_k], into `slots` clusters.

    Raises PassError if there are fewer keys than slots.
    """
    points = torch.cat([each.transpose(0, 1).flatten(1, 2) for each in keys], 1).float()
    if points.shape[1] < slots:
        raise PassError(
            f"{points.shape[1]} tokens of text cannot be sorted into {slots} slots",
            where="pass linearize, option gates",
            hint="give more text, raise samples, or lower the mixer's slots",
        )
    heads = [_clustered(head, slots) for head in points]
    return Clusters(*(torch.stack(parts) for parts in zip(*heads, strict=True)))


def _clustered(points: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Cluster the points [n, d] of one head; return weight [count, d] and bias [count]."""
    chosen = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))[:count]
    centroids = points[chosen]
    for _ in range(ROUNDS):
        nearest = _near(points, centroids).argmax(-1)
        sums = torch.zeros_like(centroids).index_add_(0, nearest, points)
        met = torch.zeros(count).index_add_(0, nearest, torch.ones(len(points)))[:, None]
        centroids = torch.where(met > 0, sums / met.clamp(min=1), centroids)
    away = points - centroids[_near(points, centroids).argmax(-1)]
    sharpness = SHARPNESS / away.square().sum(-1).mean().clamp(min=1e-12)
    return sharpness * centroids, -0.5 * sharpness * centroids.square().sum(-1)


def _near(points: Tensor, centroids: Tensor) -> Tensor:
    """Compute c . k - |c|^2 / 2, largest for the nearest centroid: [points, centroids]."""
    return points @ centroids.T - 0.5 * centroids.square().sum(-1)
