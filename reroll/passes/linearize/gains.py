"""Find the factor per head on a mixer's output that brings its layer nearest to the original.

After Taylor-Calibrate (arXiv 2606.16429), by least squares against the output of the attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from reroll.passes.linearize import combining
from reroll.passes.linearize.attention_calls import AttentionCall, Reach, attention_calls
from reroll.rewrite.analysis.layers import AttentionLayer
from reroll.rewrite.ir.ops import ATTENTION, ATTENTION_MASS
from reroll.rewrite.ir.program import Program
from reroll.rewrite.pipeline.base import Context


def measure_gains(
    program: Program,
    pairs: Mapping[fx.Node, fx.Node],
    layers: Sequence[AttentionLayer],
    inputs: Sequence[Mapping[str, Tensor]],
    reach: Reach,
    context: Context,
    least: Callable[[AttentionCall, Reach], Errors],
) -> tuple[dict[int, Tensor], dict[int, float]]:
    """Return each layer's gain per query head, and the share of the missing output it explains.

    Missing is what the attention's output has beyond that of its window. `pairs` maps each
    attention, whose arguments are still the original's, to its mixer's node. `least` gives the
    squared error of one input as a function of the gain.
    """
    sums: dict[int, Errors] = {}
    for call in attention_calls(program, layers, inputs, context, pairs):
        if call.mixed is not None:
            new, old = least(call, reach), sums.get(call.number)
            sums[call.number] = new if old is None else old.plus(new)
    best = {number: errors.best() for number, errors in sums.items()}
    gains = {number: gain for number, (gain, _) in best.items()}
    explained = {
        n: 1 - float(missed.sum() / sums[n].nothing().sum().clamp(min=1e-12))
        for n, (_, missed) in best.items()
    }
    return gains, explained


class Errors(Protocol):
    """Squared error [heads] of a layer's output as a function of the gain."""

    def plus(self, other: Any) -> Any:
        """Return the errors over both sets of tokens."""

    def nothing(self) -> Tensor:
        """Return the error at gain 0."""

    def best(self) -> tuple[Tensor, Tensor]:
        """Return the gain with the least error, and that error."""


@dataclass
class Quadratic:
    """Squared error |missing - gain * mixed|^2 of a mixer that is added to the window's output.

    `rest`, `product` and `square` are |missing|^2, missing . mixed and |mixed|^2, each [heads].
    """

    rest: Tensor
    product: Tensor
    square: Tensor

    def plus(self, other: Quadratic) -> Quadratic:
        """Return the sum of both errors."""
        return Quadratic(
            self.rest + other.rest, self.product + other.product, self.square + other.square
        )

    def nothing(self) -> Tensor:
        """Return the error at gain 0."""
        return self.rest

    def best(self) -> tuple[Tensor, Tensor]:
        """Return the least-squares gain, or 0 if that is negative, and its error."""
        gain = (self.product / self.square.clamp(min=1e-12)).clamp(min=0.0)
        return gain, self.rest - 2 * gain * self.product + gain.square() * self.square


@dataclass
class Table:
    """Squared errors [gains, heads] at each of a number of gains."""

    gains: Tensor
    errors: Tensor

    def plus(self, other: Table) -> Table:
        """Return the sum of both errors."""
        return Table(self.gains, self.errors + other.errors)

    def nothing(self) -> Tensor:
        """Return the error at gain 0."""
        return self.errors[0]

    def best(self) -> tuple[Tensor, Tensor]:
        """Return the gain of the table with the least error, and that error."""
        least = self.errors.min(0)
        return self.gains[least.indices], least.values


def least_squares(call: AttentionCall, reach: Reach) -> Quadratic:
    """Return the squared error, on one input, of a mixer that is added with a gain."""
    assert call.mixed is not None
    missing = call.out - (_windowed(ATTENTION, call, reach) if reach.window else 0.0)

    def total(x: Tensor) -> Tensor:
        return x.sum((0, 1, 3))

    return Quadratic(
        total(missing.square()), total(missing * call.mixed), total(call.mixed.square())
    )


def least_joint(call: AttentionCall, reach: Reach, logs: bool) -> Table:
    """Return the squared error, on one input, of a mixer under one normalisation with a window.

    `logs` is as in `combining.joint`.
    """
    assert call.mixed is not None
    window, mass = _windowed(ATTENTION, call, reach), _windowed(ATTENTION_MASS, call, reach, logs)
    unite = combining.merged if logs else combining.joined
    gains = torch.cat((torch.zeros(1), torch.logspace(-3, 6, 73)))
    errors = [
        (unite(window, mass, call.mixed, gain) - call.out).square().sum((0, 1, 3)) for gain in gains
    ]
    return Table(gains, torch.stack(errors))


def _windowed(op: Any, call: AttentionCall, reach: Reach, log: bool = False) -> Tensor:
    """Compute the attention's output, or its softmax divisor, over its window and sinks only."""
    options = {**call.options, "window": reach.window, "prefix": reach.sinks or None}
    tensors = (call.q, call.k, call.v) if op is ATTENTION else (call.q, call.k)
    if log:
        options["log"] = True
    with torch.no_grad():
        out: Tensor = op(*tensors, call.scale, **options)
    return out
