"""Low-rank residuals in a graph: linear layers to which up(down(x)) is added."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from reroll.errors import RerollError
from reroll.rewrite.ir.matching import is_weight
from reroll.rewrite.ir.program import Loop, Program
from reroll.rewrite.ir.weights import Apply, Expr
from reroll.rewrite.ir.weights.expressions import Source

ADD = torch.ops.aten.add.Tensor
LINEAR = torch.ops.aten.linear.default


@dataclass(frozen=True)
class LowRank:
    """One residual of a linear layer.

    Attributes:
        base: the linear layer that it is added to.
        down: the layer to `rank` channels.
        up: the layer back.
        add: the sum.
    """

    base: fx.Node
    down: fx.Node
    up: fx.Node
    add: fx.Node

    @property
    def weights(self) -> tuple[str, str]:
        """The names of the two factors, down and up."""
        return _name(self.down), _name(self.up)


def low_rank(graph: fx.Graph) -> list[LowRank]:
    """The residuals in a graph, in the order in which they run."""
    found = []
    for up in graph.nodes:
        if not _is_linear(up) or not _is_linear(down := up.args[0]) or len(down.users) != 1:
            continue
        for add in up.users:
            base = _base(add, up, down.args[0]) if add.target is ADD else None
            if base is not None:
                found.append(LowRank(base, down, up, add))
    return found


def ranks(program: Program, loop: Loop, residual: LowRank) -> tuple[int, ...]:
    """The rank of a residual in each trip: 0 where its factor down is stored as zeros.

    Reads weights only where trips can differ, and takes a rank as it is stored where they cannot be
    read.
    """
    weight = program.weights[residual.weights[0]]
    rank = int(weight.meta.shape[0])
    index = weight.index or (0,) * loop.trips
    blocks = program.weights[_name(residual.base)].index or ()
    # a trip that has its block to itself has no residual, and neither has one out of the budget
    alone = any(blocks.count(block) == 1 for block in blocks)
    empty: set[int] = set()
    if alone or _is_split(residual) or len(weight.entries) < loop.trips:
        empty = {n for n, entry in enumerate(weight.entries) if is_zero(entry, program)}
    return tuple(0 if entry in empty else rank for entry in index)


def is_zero(expr: Expr, program: Program) -> bool:
    """Whether a weight is known to be zeros."""
    if isinstance(expr, Apply) and expr.op == "scale":
        return expr.args[-1] == 0.0
    if isinstance(expr, Apply) and expr.op == "zeros":
        return True
    if isinstance(expr, Source):
        try:
            return not bool(program.source.load(expr.name).any())
        except RerollError:
            return False
    return False


def _is_split(residual: LowRank) -> bool:
    """Whether the linear layer has more than one residual."""
    return residual.add.args[0] is not residual.base and residual.add.args[1] is not residual.base


def _base(add: fx.Node, up: fx.Node, x: Any) -> fx.Node | None:
    """The linear layer over `x` that a sum adds `up` to, through other residuals of it."""
    other = next((a for a in add.args[:2] if a is not up), None)
    while isinstance(other, fx.Node) and other.target is ADD:
        sides = [a for a in other.args[:2] if isinstance(a, fx.Node) and _is_linear(a)]
        below = [a for a in other.args[:2] if a not in sides]
        direct = [a for a in sides if a.args[0] is x]
        other = direct[0] if direct else below[0] if len(below) == 1 else None
    if isinstance(other, fx.Node) and _is_linear(other) and other.args[0] is x:
        return other
    return None


def _is_linear(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is LINEAR and _is_weight(node.args[1])


def _is_weight(value: Any) -> bool:
    return isinstance(value, fx.Node) and is_weight(value)


def _name(linear: fx.Node) -> str:
    weight = linear.args[1]
    assert isinstance(weight, fx.Node)
    return str(weight.target)
