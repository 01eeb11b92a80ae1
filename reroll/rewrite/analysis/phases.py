"""Phases: contiguous runs of layers that change the hidden state in similar ways.

The Block-Recurrent Hypothesis (arXiv 2512.19941): the depth of a trained transformer falls into a
few contiguous phases. One block per phase, applied repeatedly, can replace its layers. Phases are
found in a matrix of distances between layers by dynamic programming over contiguous segments.
Repeated bisection without that constraint shows whether the two agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

# up to this many layers, every bisection is evaluated
EXHAUSTIVE = 14
# one more phase has to move this fraction of the total distance between phases
GAIN = 0.05


@dataclass(frozen=True)
class Phases:
    """Segmentation: first layers of phases, and the fraction of the distance between phases."""

    starts: tuple[int, ...]
    layers: int
    between: float

    def index(self) -> tuple[int, ...]:
        """Return the phase of each layer."""
        return tuple(sum(s <= layer for s in self.starts) - 1 for layer in range(self.layers))

    def __str__(self) -> str:
        stops = [*self.starts[1:], self.layers]
        return " | ".join(
            f"{a}-{b - 1}" if b - a > 1 else f"{a}" for a, b in zip(self.starts, stops, strict=True)
        )


def cosine_distances(states: Tensor) -> Tensor:
    """Compute 1 - cos between layers [layers, layers], averaged over tokens.

    `states` are [layers, tokens, width].
    """
    unit = states / states.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    layers, tokens = states.shape[:2]
    flat = unit.reshape(layers, -1)
    distances: Tensor = (1 - flat @ flat.T / tokens).clamp_min(0)
    return distances.fill_diagonal_(0)


def linear_cka(states: Tensor) -> Tensor:
    """Compute linear centred kernel alignment between layers [layers, layers].

    Kornblith et al., Similarity of Neural Network Representations Revisited (arXiv 1905.00414).
    `states` are [layers, tokens, width].
    """
    centred = (states - states.mean(1, keepdim=True)).double()
    grams = [x @ x.T if x.shape[0] < x.shape[1] else x.T @ x for x in centred]
    norms = [g.norm() for g in grams]
    result = torch.ones(len(grams), len(grams), dtype=torch.float64)
    for i, j in combinations(range(len(grams)), 2):
        both = (centred[i].T @ centred[j]).square().sum()
        result[i, j] = result[j, i] = both / (norms[i] * norms[j])
    return result.float()


def segment(distances: Tensor, phases: int) -> Phases:
    """Split the layers into contiguous phases so that the distance inside phases is minimal.

    This is dynamic programming over the boundaries: O(phases * layers^2).
    """
    layers = distances.shape[0]
    prefix = torch.zeros(layers + 1, layers + 1, dtype=torch.float64)
    prefix[1:, 1:] = distances.double().cumsum(0).cumsum(1)

    def inside(start: int, stop: int) -> float:
        block = prefix[stop, stop] - prefix[start, stop] - prefix[stop, start]
        return (block + prefix[start, start]).item() / 2

    # best[stop]: the minimal distance inside phases of the first `stop` layers, and their starts
    best: dict[int, tuple[float, tuple[int, ...]]] = {
        stop: (inside(0, stop), (0,)) for stop in range(1, layers + 1)
    }
    for count in range(2, phases + 1):
        best = {
            stop: min(
                (best[cut][0] + inside(cut, stop), (*best[cut][1], cut))
                for cut in range(count - 1, stop)
            )
            for stop in range(count, layers + 1)
        }
    cost, starts = best[layers]
    total = inside(0, layers)
    return Phases(starts, layers, 1 - cost / total if total else 0.0)


def choose(distances: Tensor, most: int = 8, gain: float = GAIN) -> tuple[Phases, list[Phases]]:
    """Choose the number of phases: stop where one more phase gains less than `gain`.

    The gain is the increase of the fraction of the distance that lies between phases. Return the
    chosen segmentation and the segmentations for every number of phases from 1 to `most`.
    """
    tried = [segment(distances, k) for k in range(1, min(most, distances.shape[0]) + 1)]
    chosen = tried[0]
    for each in tried[1:]:
        if each.between - chosen.between < gain:
            break
        chosen = each
    return chosen, tried


def bisections(distances: Tensor, phases: int, seed: int = 0) -> list[list[int]]:
    """Cluster layers, contiguous or not, by repeatedly applying the heaviest maximum cut.

    For up to 14 layers, the maximum cut is found by exhaustive search. For more, it is the best
    local maximum of hill climbing from 32 random and all contiguous cuts.
    """
    clusters = [list(range(distances.shape[0]))]
    while len(clusters) < phases:
        cuts = [(*_maximum_cut(distances, c, seed), c) for c in clusters if len(c) > 1]
        if not cuts:
            break
        _, (left, right), old = max(cuts, key=lambda cut: cut[0])
        clusters.remove(old)
        clusters += [left, right]
    return sorted(clusters)


def _maximum_cut(
    distances: Tensor, cluster: Sequence[int], seed: int
) -> tuple[float, tuple[list[int], list[int]]]:
    part = distances[list(cluster)][:, list(cluster)].double()
    size = len(cluster)
    if size <= EXHAUSTIVE:
        masks = torch.arange(1, 2 ** (size - 1))
        sides = ((masks[:, None] >> torch.arange(size)) & 1).double()
    else:
        generator = torch.Generator().manual_seed(seed)
        random = torch.randint(0, 2, (32, size), generator=generator)
        # every contiguous cut is a start, so that the result is no worse than the best of those
        contiguous = (torch.arange(size) >= torch.arange(1, size)[:, None]).long()
        sides = torch.stack([_climbed(part, s.double()) for s in torch.cat([random, contiguous])])
    weights = ((sides @ part) * (1 - sides)).sum(1)
    side = sides[int(weights.argmax())].bool().tolist()
    left = [layer for layer, right in zip(cluster, side, strict=True) if not right]
    right = [layer for layer, right in zip(cluster, side, strict=True) if right]
    return weights.max().item(), (left, right)


def _climbed(part: Tensor, side: Tensor) -> Tensor:
    """Improve a cut by moving single layers until no move increases its weight."""
    while True:
        signs = 1 - 2 * side
        # a move adds the distances to its own side to the cut and removes those to the other side
        gains = signs * (part @ signs)
        best = int(gains.argmax())
        if gains[best] <= 1e-12:
            return side
        side = side.clone()
        side[best] = 1 - side[best]
