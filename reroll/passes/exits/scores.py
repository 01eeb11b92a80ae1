"""How sure a token is: the scores of all criteria, as nodes of a loop's body."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from reroll.passes.exits import classifiers
from reroll.passes.exits.nodes import Nodes
from reroll.rewrite.ir.exits import STREAK
from reroll.rewrite.ir.inserting import insert
from reroll.rewrite.ir.program import TensorType
from reroll.rewrite.ir.weights import Expr, Weight, normal, zeros

aten = torch.ops.aten
RECURRENCE = torch.ops.reroll.recurrence.default

CHANGES = ("saturation", "latent")
CLASSIFIERS = ("linear", "mlp", "gated")
FLOAT, INT = torch.float32, torch.int64


@dataclass
class Scores:
    """Builds the score of a criterion.

    `stack` makes a weight with one entry for each exit from a function of the exit's number;
    `logits` gives the logits of a hidden state. `padding` is the body's padding, and `idle` says
    who is not there, for criteria that look at predecessors.
    """

    nodes: Nodes
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
        """The score [batch, time] of a token whose hidden state was `old` and is `new`.

        `extra` is then what else the loop carries to the next trip.
        """
        wide = self.nodes.wide(new)
        if self.criterion in CHANGES:
            return self._change(self.nodes.wide(old), wide)
        if self.criterion in CLASSIFIERS:
            return self._classifier(wide)
        logits = self.nodes.wide(self.logits(new))
        if self.criterion == "patience":
            return self._streak(logits, carried, threshold)
        return self._margin(logits) if self.criterion == "margin" else self._entropy(logits)

    def _change(self, old: fx.Node, new: fx.Node) -> fx.Node:
        call, number = self.nodes.call, self.nodes.per_token(FLOAT)
        if self.criterion == "saturation":
            return call(aten.cosine_similarity.default, (old, new, -1), number)
        change = call(aten.sub.Tensor, (new, old), new.meta["type"])
        sizes = [call(aten.norm.ScalarOpt_dim, (x, 2, [-1]), number) for x in (change, new)]
        return call(aten.neg.default, (call(aten.div.Tensor, tuple(sizes), number),), number)

    def _streak(
        self, logits: fx.Node, carried: Mapping[str, fx.Node], threshold: fx.Node
    ) -> fx.Node:
        call, index = self.nodes.call, self.nodes.per_token(INT)
        token = call(aten.argmax.default, (logits, -1), index)
        pair = call(STREAK, (token, carried["last"], carried["count"], threshold), None)
        last, count = (call(operator.getitem, (pair, i), index) for i in (0, 1))
        self.extra = last, count
        return call(aten.to.dtype, (count, FLOAT), self.nodes.per_token(FLOAT))

    def _margin(self, logits: fx.Node) -> fx.Node:
        call, number = self.nodes.call, self.nodes.per_token(FLOAT)
        p = call(aten.softmax.int, (logits, -1), logits.meta["type"])
        top = call(aten.topk.default, (p, 2), None)
        best = call(operator.getitem, (top, 0), TensorType(FLOAT, (*number.shape, 2)))
        first, second = (call(aten.select.int, (best, -1, i), number) for i in (0, 1))
        return call(aten.sub.Tensor, (first, second), number)

    def _entropy(self, logits: fx.Node) -> fx.Node:
        call, number = self.nodes.call, self.nodes.per_token(FLOAT)
        kind = logits.meta["type"]
        p = call(aten.softmax.int, (logits, -1), kind)
        log = call(aten.log_softmax.int, (logits, -1), kind)
        product = call(aten.mul.Tensor, (p, log), kind)
        negative = call(aten.sum.dim_IntList, (product, [-1]), number)
        part = call(aten.div.Tensor, (negative, math.log(kind.shape[-1])), number)
        return call(aten.add.Tensor, (part, 1.0), number)

    # ---- classifiers

    def _classifier(self, wide: fx.Node) -> fx.Node:
        """The probability that a token may leave, from its hidden state at unit RMS."""
        graph, channels, units = self.nodes.graph, wide.meta["type"].shape[-1], self.units
        norm: Any = torch.ops.reroll.rms_norm.default
        unit = self.nodes.call(norm, (wide, None, 1e-6, 0.0), wide.meta["type"])
        deviation = channels**-0.5

        def matrix(name: str, rows: int) -> fx.Node:
            def entry(number: int) -> Expr:
                return normal((rows, channels), deviation, 100 * len(name) + number, FLOAT)

            return self.stack(f"{name}.weight", entry)

        def nothing(name: str, *shape: int) -> fx.Node:
            return self.stack(name, lambda _: zeros(shape, FLOAT))

        size = units if self.criterion == "mlp" else channels
        if self.criterion == "mlp":
            unit = insert(graph, classifiers.raised, [unit, matrix("up", units)])
        if self.criterion == "gated":
            state = self._recurrence(unit, matrix, nothing)
            past = nothing("past.weight", 1, units)
            last = [nothing("score.weight", 1, size), nothing("score.bias", 1)]
            logit = insert(graph, classifiers.read, [state, unit, past, *last])
        else:
            last = [nothing("score.weight", 1, size), nothing("score.bias", 1)]
            logit = insert(graph, classifiers.linear, [unit, *last])
        return self.nodes.call(aten.sigmoid.default, (logit,), self.nodes.per_token(FLOAT))

    def _recurrence(self, unit: fx.Node, matrix: Any, nothing: Any) -> fx.Node:
        graph = self.nodes.graph
        weights = [matrix("gate", self.units), nothing("gate.bias", self.units)]
        weights.append(matrix("value", self.units))
        decay = insert(graph, lambda *x: classifiers.gates(*x)[0], [unit, *weights])
        new = insert(graph, lambda *x: classifiers.gates(*x)[1], [unit, *weights])
        ones = self.nodes.call(aten.ones_like.default, (new,), new.meta["type"])
        batch, time = self.nodes.tokens
        node = self.nodes.call(
            RECURRENCE,
            (ones, ones, new, [decay], classifiers.RULE, classifiers.RULE_OPTIONS),
            TensorType(FLOAT, (batch, time, self.units, 1)),
        )
        known = {"padding": self.padding, "idle": self.idle}
        node.kwargs = {name: value for name, value in known.items() if value is not None}
        return node


def stacked_weight(make: Callable[[int], Expr], at: list[int], trips: int) -> Weight:
    """A weight with one entry for each exit; trips without one name that of the next."""
    entries = tuple(make(number) for number in range(len(at)))
    index = tuple(min(sum(trip >= stop for stop in at), len(at) - 1) for trip in range(trips))
    return Weight(entries, index)
