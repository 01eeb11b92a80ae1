"""Allocate a budget of parameters to the low-rank residuals that it reduces most."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Spectrum:
    """Squared singular values of a residual [out, in], and the cost of one rank.

    `energy` holds them, largest first, as shares of the squared norm of the original matrix. `cost`
    is out + in parameters.
    """

    energy: Tensor
    cost: int


def spectrum(residual: Tensor, original: Tensor) -> Spectrum:
    """Compute a residual's spectrum from the eigenvalues of its smaller Gram matrix, in fp64."""
    wide = residual.double()
    gram = wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
    values = torch.linalg.eigvalsh(gram).clamp_min(0).flip(0)
    whole = original.double().square().sum().clamp_min(1e-30)
    return Spectrum(values / whole, sum(residual.shape))


def tiers(shape: tuple[int, ...], step: int) -> list[int]:
    """List the ranks that a residual may get: 0, step, 2 step, 4 step, ... while factors save.

    They are few, because each rank is a pair of factors in the graph.
    """
    ranks = [0]
    rank = step
    while rank * sum(shape) < shape[0] * shape[1]:
        ranks.append(rank)
        rank *= 2
    return ranks


def allocate(
    spectra: Mapping[Key, Spectrum], choices: Mapping[Key, list[int]], budget: int
) -> dict[Key, int]:
    """Choose the rank of each residual so that all factors have at most `budget` parameters.

    Greedy by the energy that the next rank removes per parameter. That is optimal, except for the
    last ranks that fit, because every spectrum is sorted in descending order.
    """
    ranks = dict.fromkeys(spectra, 0)
    order = list(spectra)

    def next_gain(number: int) -> tuple[float, int] | None:
        key = order[number]
        higher = [rank for rank in choices[key] if rank > ranks[key]]
        if not higher:
            return None
        energy = spectra[key].energy[ranks[key] : higher[0]].sum().item()
        return -energy / (spectra[key].cost * (higher[0] - ranks[key])), number

    heap = [each for number in range(len(order)) if (each := next_gain(number)) is not None]
    heapify(heap)
    while heap:
        gain, number = heappop(heap)
        key = order[number]
        higher = min(rank for rank in choices[key] if rank > ranks[key])
        cost = spectra[key].cost * (higher - ranks[key])
        if gain == 0.0 or cost > budget:
            continue
        budget -= cost
        ranks[key] = higher
        following = next_gain(number)
        if following is not None:
            heappush(heap, following)
    return ranks
