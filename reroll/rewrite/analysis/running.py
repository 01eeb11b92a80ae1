"""Which nodes of a loop's body do anything in one trip.

Layers of one loop may be of different kinds: a trip without a recurrence still has its node, which
is not active there, and a trip whose attention sees nothing still has its attention.
"""

from __future__ import annotations

import torch
from torch import fx

from reroll.rewrite.analysis.costs import working
from reroll.rewrite.ir.dtypes import CONVERSIONS
from reroll.rewrite.ir.matching import argument
from reroll.rewrite.ir.ops import ATTENTION, BIDIRECTIONAL, RECURRENCE
from reroll.rewrite.ir.ops.base import Place
from reroll.rewrite.ir.program import Loop
from reroll.rewrite.ir.visibility import Visibility

aten = torch.ops.aten

# what gives zeros for zeros in its first argument
_KEEPS_ZERO = {
    *CONVERSIONS,
    aten.div.Tensor,
    aten.reshape.default,
    aten.slice.Tensor,
    aten.squeeze.dim,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.view.default,
}


def running(loop: Loop, trip: int) -> set[fx.Node]:
    """The nodes of the body whose values one trip computes and uses."""
    place = Place(0, loop, trip)
    nodes = working(loop, trip)
    zero: set[fx.Node] = set()
    for node in nodes:
        if is_idle(node, place) or _is_zero(node, zero):
            zero.add(node)
    used: set[fx.Node] = set()
    known = set(nodes)
    stack = [loop.body.graph.output_node()]
    while stack:
        node = stack.pop()
        if node in used or node in zero or node not in known:
            continue
        used.add(node)
        stack += node.all_input_nodes
    return used


def is_idle(node: fx.Node, place: Place) -> bool:
    """Whether an attention sees nothing, or a recurrence is not active, at a place."""
    if node.target in (RECURRENCE, BIDIRECTIONAL):
        return place.resolve(argument(node, "active")) is False
    if node.target is ATTENTION:
        return Visibility.of(node).map(place.resolve).is_empty
    return False


def _is_zero(node: fx.Node, zero: set[fx.Node]) -> bool:
    if node.target is aten.mul.Tensor:
        return any(a in zero for a in node.args if isinstance(a, fx.Node))
    first = node.args[0] if node.args else None
    return node.target in _KEEPS_ZERO and isinstance(first, fx.Node) and first in zero
