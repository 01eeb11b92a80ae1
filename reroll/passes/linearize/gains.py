"""How loud a mixer has to be: the factor per head that brings its layer nearest to the original.

After Taylor-Calibrate (arXiv 2606.16429), by least squares on what the attention gave.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from reroll.passes.linearize import combining
from reroll.passes.linearize.observed import Reach, Seen, observed
from reroll.rewrite.analysis.layers import Layer
from reroll.rewrite.ir.ops import ATTENTION, ATTENTION_MASS
from reroll.rewrite.ir.program import Program
from reroll.rewrite.pipeline.base import Context


def measure_gains(
    program: Program,
    pairs: Mapping[fx.Node, fx.Node],
    layers: Sequence[Layer],
    inputs: Sequence[Mapping[str, Tensor]],
    reach: Reach,
    context: Context,
    least: Callable[[Seen, Reach], Errors],
) -> tuple[dict[int, Tensor], dict[int, float]]:
    """For every layer the gain per query head, and how much of what is missing it brings back.

    `pairs` has the mixer's node of each attention, whose arguments are still the original's;
    `least` says what each of a set of gains would miss on one input.
    """
    sums: dict[int, Errors] = {}
    for seen in observed(program, layers, inputs, context, pairs):
        if seen.mixed is not None:
            new, old = least(seen, reach), sums.get(seen.number)
            sums[seen.number] = new if old is None else old.plus(new)
    best = {number: errors.best() for number, errors in sums.items()}
    gains = {number: gain for number, (gain, _) in best.items()}
    explained = {
        n: 1 - float(missed.sum() / sums[n].nothing().sum().clamp(min=1e-12))
        for n, (_, missed) in best.items()
    }
    return gains, explained


class Errors(Protocol):
    """The squared error [heads] of a layer's output as a function of the gain."""

    def plus(self, other: Any) -> Any:
        """The errors over both sets of tokens."""

    def nothing(self) -> Tensor:
        """The error at gain 0."""

    def best(self) -> tuple[Tensor, Tensor]:
        """The gain with the least error, and that error."""


@dataclass
class Quadratic:
    """|missing - gain * mixed|^2."""

    rest: Tensor
    product: Tensor
    square: Tensor

    def plus(self, other: Quadratic) -> Quadratic:
        """The sum of both."""
        return Quadratic(
            self.rest + other.rest, self.product + other.product, self.square + other.square
        )

    def nothing(self) -> Tensor:
        """The error at gain 0."""
        return self.rest

    def best(self) -> tuple[Tensor, Tensor]:
        """The least squares solution, or 0 if that is negative."""
        gain = (self.product / self.square.clamp(min=1e-12)).clamp(min=0.0)
        return gain, self.rest - 2 * gain * self.product + gain.square() * self.square


@dataclass
class Table:
    """The error at each of a number of gains: [gains, heads]."""

    gains: Tensor
    errors: Tensor

    def plus(self, other: Table) -> Table:
        """The sum of both."""
        return Table(self.gains, self.errors + other.errors)

    def nothing(self) -> Tensor:
        """The error at gain 0."""
        return self.errors[0]

    def best(self) -> tuple[Tensor, Tensor]:
        """The gain of the table with the least error."""
        least = self.errors.min(0)
        return self.gains[least.indices], least.values


def least_squares(seen: Seen, reach: Reach) -> Quadratic:
    """What a mixer misses that is added with a gain."""
    assert seen.mixed is not None
    missing = seen.out - (_windowed(ATTENTION, seen, reach) if reach.window else 0.0)

    def total(x: Tensor) -> Tensor:
        return x.sum((0, 1, 3))

    return Quadratic(
        total(missing.square()), total(missing * seen.mixed), total(seen.mixed.square())
    )


def least_joint(seen: Seen, reach: Reach, logs: bool) -> Table:
    """What a mixer misses that shares one normalisation with the window; `logs` as there."""
    assert seen.mixed is not None
    window, mass = _windowed(ATTENTION, seen, reach), _windowed(ATTENTION_MASS, seen, reach, logs)
    unite = combining.merged if logs else combining.joined
    gains = torch.cat((torch.zeros(1), torch.logspace(-3, 6, 73)))
    errors = [
        (unite(window, mass, seen.mixed, gain) - seen.out).square().sum((0, 1, 3)) for gain in gains
    ]
    return Table(gains, torch.stack(errors))


def _windowed(op: Any, seen: Seen, reach: Reach, log: bool = False) -> Tensor:
    """What the attention would give, or divide by, over the window and the first tokens."""
    named = {**seen.named, "window": reach.window, "prefix": reach.sinks or None}
    tensors = (seen.q, seen.k, seen.v) if op is ATTENTION else (seen.q, seen.k)
    if log:
        named["log"] = True
    with torch.no_grad():
        out: Tensor = op(*tensors, seen.scale, **named)
    return out
