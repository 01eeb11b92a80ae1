"""Operations and state of a Program, counted from the types in its graphs.

Only matrix products and attention are counted, at two operations for one multiply-add; the rest of
a transformer is negligible. The costs of reroll's own ops are in `reroll.rewrite.ir.ops`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from reroll.rewrite.ir.exits import exits_of, is_open
from reroll.rewrite.ir.matching import shape
from reroll.rewrite.ir.ops import is_stateful
from reroll.rewrite.ir.ops.base import FLOPS, STATE, Cost, Place, count, register
from reroll.rewrite.ir.program import Loop, Program

aten = torch.ops.aten

CONTEXT = 1024


def flops_per_token(program: Program, context: int = CONTEXT) -> int:
    """Count the operations for one more token with `context` tokens before it.

    A model whose length is fixed (a vision transformer) counts as one token: the whole input.
    """
    return _total(program, FLOPS, context)


def state_bytes(program: Program, context: int) -> int:
    """Count the bytes of state that one sequence of `context` tokens needs during generation."""
    return _total(program, STATE, context)


def keeps_state(program: Program) -> bool:
    """Whether any op of a Program has state, as in models that generate."""
    return any(is_stateful(n) for _, graph in program.graphs() for n in graph.nodes)


def state_of(nodes: Iterable[fx.Node], place: Place) -> int:
    """Bytes of state that some nodes hold at one place; those of a whole trip are `working`."""
    return _sum(nodes, STATE, place)


def working(loop: Loop, trip: int) -> list[fx.Node]:
    """The nodes of a loop's body without those that decide about an exit that is closed."""
    exits = exits_of(loop)
    # where nobody can leave, no score is computed
    closed = exits is not None and not is_open(exits.thresholds[trip])
    skipped = exits.tests if exits is not None and closed else frozenset()
    return [node for node in loop.body.graph.nodes if node not in skipped]


def _total(program: Program, rules: dict[Any, Cost], context: int) -> int:
    total = _sum(program.graph.nodes, rules, Place(context))
    for loop in program.loops:
        for trip in range(loop.trips):
            total += _sum(working(loop, trip), rules, Place(context, loop, trip))
    return total


def _sum(nodes: Iterable[fx.Node], rules: dict[Any, Cost], place: Place) -> int:
    return sum(rules[n.target](n, place) for n in nodes if n.target in rules)


# ---- matrix products


def _linear(node: fx.Node, place: Place) -> int:
    x, weight = shape(node.args[0]), shape(node.args[1])
    return 2 * count(x[:-1]) * count(weight)


def _matmul(operands: slice) -> Cost:
    """Return the cost rule of products of two activations [..., n, k] and [..., k, m]."""

    def rule(node: fx.Node, place: Place) -> int:
        left, _ = node.args[operands]
        inner, result = shape(left)[-1:], shape(node)
        # a symbolic size of the columns or of the inner dimension is the length of the context
        sizes = [d if isinstance(d, int) else place.context for d in (*inner, *result[-1:])]
        return 2 * count(result[:-1]) * math.prod(sizes)

    return rule


def _convolution(node: fx.Node, place: Place) -> int:
    return 2 * count(shape(node)) * count(shape(node.args[1])[1:])


register(aten.linear.default, flops=_linear)
for _op in (aten.mm.default, aten.bmm.default, aten.matmul.default):
    register(_op, flops=_matmul(slice(0, 2)))
for _op in (aten.addmm.default, aten.baddbmm.default):
    register(_op, flops=_matmul(slice(1, 3)))
for _op in (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default):
    register(_op, flops=_convolution)
