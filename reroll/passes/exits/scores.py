"""Build the scores of all exit criteria as nodes of a loop's body."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from reroll.passes.exits import classifiers
from reroll.rewrite.ir.builder import Builder
from reroll.rewrite.ir.matching import shape
from reroll.rewrite.ir.ops import RECURRENCE, RMS_NORM, STREAK
from reroll.rewrite.ir.weights import Expr, Weight, normal, zeros

aten = torch.ops.aten
SOFTMAX = aten.softmax.int

CHANGES = ("saturation", "latent")
CLASSIFIERS = ("linear", "mlp", "gated")
FLOAT = torch.float32


@dataclass
class Scores:
    """Builder of the score of a criterion.

    `stack` adds a weight with one entry for each exit, from a function of the exit's number.
    `logits` gives the logits of a hidden state. For criteria that read preceding tokens, `padding`
    is the body's padding mask, and `idle` marks tokens that have left.
    """

    build: Builder
    criterion: str
    units: int
    stack: Callable[[str, Callable[[int], Expr]], fx.Node]
    logits: Callable[[fx.Node], fx.Node]
    padding: fx.Node | None = None
    idle: fx.Node | None = None
    extra: tuple[fx.Node, ...] = field(default=(), init=False)

    def make(
        self, old: fx.Node, new: fx.Node, carried: Mapping[str, fx.Node], threshold: fx.Node
    ) -> fx.Node:
        """Build the score [batch, time] of a token whose hidden state changed from `old` to `new`.

        `extra` then holds the values of the criterion that the loop carries to the next trip.
        """
        wide = self.build.wide(new)
        if self.criterion in CHANGES:
            return self._change(self.build.wide(old), wide)
        if self.criterion in CLASSIFIERS:
            return self._classifier(wide)
        logits = self.build.wide(self.logits(new))
        if self.criterion == "patience":
            return self._streak(logits, carried, threshold)
        return self._margin(logits) if self.criterion == "margin" else self._entropy(logits)

    def _change(self, old: fx.Node, new: fx.Node) -> fx.Node:
        call = self.build.call
        if self.criterion == "saturation":
            return call(aten.cosine_similarity.default, old, new, -1)
        change = call(aten.sub.Tensor, new, old)
        sizes = [call(aten.norm.ScalarOpt_dim, x, 2, [-1]) for x in (change, new)]
        return call(aten.neg.default, call(aten.div.Tensor, *sizes))

    def _streak(
        self, logits: fx.Node, carried: Mapping[str, fx.Node], threshold: fx.Node
    ) -> fx.Node:
        call = self.build.call
        token = call(aten.argmax.default, logits, -1)
        pair = call(STREAK, token, carried["last"], carried["count"], threshold)
        last, count = (call(operator.getitem, pair, i) for i in (0, 1))
        self.extra = last, count
        return call(aten.to.dtype, count, FLOAT)

    def _margin(self, logits: fx.Node) -> fx.Node:
        call = self.build.call
        best = call(operator.getitem, call(aten.topk.default, call(SOFTMAX, logits, -1), 2), 0)
        first, second = (call(aten.select.int, best, -1, i) for i in (0, 1))
        return call(aten.sub.Tensor, first, second)

    def _entropy(self, logits: fx.Node) -> fx.Node:
        call = self.build.call
        p, log = call(SOFTMAX, logits, -1), call(aten.log_softmax.int, logits, -1)
        negative = call(aten.sum.dim_IntList, call(aten.mul.Tensor, p, log), [-1])
        part = call(aten.div.Tensor, negative, math.log(shape(logits)[-1]))
        return call(aten.add.Tensor, part, 1.0)

    # ---- classifiers

    def _classifier(self, wide: fx.Node) -> fx.Node:
        """Build the probability that a token may leave, from its hidden state at unit RMS."""
        build, channels, units = self.build, shape(wide)[-1], self.units
        unit = build.call(RMS_NORM, wide, None, 1e-6, 0.0)
        deviation = channels**-0.5

        def matrix(name: str, rows: int) -> fx.Node:
            def entry(number: int) -> Expr:
                return normal((rows, channels), deviation, 100 * len(name) + number, FLOAT)

            return self.stack(f"{name}.weight", entry)

        def nothing(name: str, *shape: int) -> fx.Node:
            return self.stack(name, lambda _: zeros(shape, FLOAT))

        size = units if self.criterion == "mlp" else channels
        if self.criterion == "mlp":
            unit = build.trace(classifiers.raised, unit, matrix("up", units))
        if self.criterion == "gated":
            state = self._recurrence(unit, matrix, nothing)
            past = nothing("past.weight", 1, units)
            last = [nothing("score.weight", 1, size), nothing("score.bias", 1)]
            logit = build.trace(classifiers.read, state, unit, past, *last)
        else:
            last = [nothing("score.weight", 1, size), nothing("score.bias", 1)]
            logit = build.trace(classifiers.linear, unit, *last)
        return build.call(aten.sigmoid.default, logit)

    def _recurrence(self, unit: fx.Node, matrix: Any, nothing: Any) -> fx.Node:
        build = self.build
        weights = [matrix("gate", self.units), nothing("gate.bias", self.units)]
        weights.append(matrix("value", self.units))
        decay = build.trace(lambda *x: classifiers.gates(*x)[0], unit, *weights)
        new = build.trace(lambda *x: classifiers.gates(*x)[1], unit, *weights)
        ones = build.call(aten.ones_like.default, new)
        known = {"padding": self.padding, "idle": self.idle}
        return build.call(
            RECURRENCE,
            *(ones, ones, new, [decay], classifiers.RULE, classifiers.RULE_OPTIONS),
            **{name: value for name, value in known.items() if value is not None},
        )


def stacked_weight(make: Callable[[int], Expr], at: list[int], trips: int) -> Weight:
    """Return a weight with one entry for each exit.

    Other trips use the entry of the next exit, or of the last.
    """
    entries = tuple(make(number) for number in range(len(at)))
    index = tuple(min(sum(trip >= stop for stop in at), len(at) - 1) for trip in range(trips))
    return Weight(entries, index)
