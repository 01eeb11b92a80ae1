"""The number of trips that a loop runs, where all its trips are alike."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from reroll.bounds import COUNT, NOT_NEGATIVE, POSITIVE, check_number
from reroll.errors import UsageError
from reroll.rewrite.ir.program import Loop, Program, weight_nodes
from reroll.runtime.functions.loops import Trips


def set_trips(
    program: Program,
    loops: Mapping[str, Trips],
    trips: int | None,
    backprop: int | None,
    name: str | None,
) -> None:
    """Set the number of trips of loops; see `RerollPreTrainedModel.set_trips`."""
    alike = {loop.name: loop.trips for loop in program.loops if trips_are_alike(program, loop)}
    # a layer that runs once is a loop of one trip: it is changed only when named
    chosen = [n for n, count in alike.items() if n == name or (name is None and count > 1)]
    if not chosen:
        raise UsageError(
            "no loop can run another number of trips" + (f" ({name})" if name else ""),
            hint=f"loops whose trips are alike: {', '.join(alike) or 'none'}",
        )
    for key, count in (("trips", trips), ("backprop", backprop)):
        if count is not None:
            check_number(key, count, COUNT, "set_trips")
    for each in chosen:
        loops[each].count, loops[each].backprop = trips, backprop


def trips_are_alike(program: Program, loop: Loop) -> bool:
    """Whether every trip of a loop has the same weights and inputs."""
    if any(isinstance(value, tuple) for value in loop.inputs):
        return False
    indices = (program.weights[n].index for n in weight_nodes(loop.body.graph))
    return all(index is None or len(set(index)) == 1 for index in indices)


def sample_trips(
    mean: float, *, backprop: int = 8, spread: float = 0.5, generator: torch.Generator | None = None
) -> tuple[int, int]:
    """Draw a random number of trips for one training step, and how many of them get gradients.

    Poisson(rate) + 1 with log(rate) normal around log(mean) - spread^2 / 2: the distribution of
    arXiv 2502.05171, section 3.3. Gradients flow through the last `backprop` trips at most.
    """
    check_number("mean", mean, POSITIVE, "sample_trips", integer=False)
    check_number("backprop", backprop, COUNT, "sample_trips")
    check_number("spread", spread, NOT_NEGATIVE, "sample_trips", integer=False)
    normal = torch.randn((), generator=generator).item()
    rate = math.exp(math.log(mean) - spread**2 / 2 + spread * normal)
    count = int(torch.poisson(torch.tensor(rate), generator=generator).item()) + 1
    return count, min(backprop, count)
