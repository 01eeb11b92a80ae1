"""What mixes the tokens of a row beside attention and recurrences: convolutions, shifts, sums.

Such an op knows nothing of the documents that packed rows hold.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from reroll.rewrite.capture.rolling.roll import data_nodes
from reroll.rewrite.ir import ops
from reroll.rewrite.ir.dtypes import CONVERSIONS
from reroll.rewrite.ir.matching import argument, shape
from reroll.rewrite.ir.ops import ATTENTION, ATTENTION_MASS, BIDIRECTIONAL, CACHE, MASK, RECURRENCE
from reroll.rewrite.ir.program import Loop, Program
from reroll.rewrite.ir.records import Input

aten = torch.ops.aten

# the tokens' dimension
TIME = "s"

# these take documents
_TOLD = {ATTENTION, ATTENTION_MASS, RECURRENCE}
_KEPT = {CACHE, BIDIRECTIONAL, MASK}
# these move tokens to other places of a tensor, and each keeps its own value
_LAYOUT = {
    aten.reshape.default, aten.view.default, aten.flatten.using_ints, aten.unflatten.int,
}  # fmt: skip
# these keep the shape, and mix along the dimension that they are given second
_ALONG = {
    aten.cumsum.default, aten.cumprod.default, aten.logcumsumexp.default, aten.flip.default,
    aten.roll.default, aten.softmax.int, aten.log_softmax.int, aten.sort.default,
}  # fmt: skip


def other_mixing(program: Program) -> str | None:
    """The first thing that would mix the documents of a row, in words; None if nothing does."""
    item = next((i for i in program.inputs if i.role == "positions"), None)
    if item is None:
        return None
    loops = {loop.name: loop for loop in program.loops}
    for name, graph in program.graphs():
        for node in graph.nodes:
            if _is_causal(node) and not _reads(node, loops.get(name), mask_beside(item)):
                return f"{node.name}, which does not read the padding mask itself,"
    if program.has_past:
        # tokens that are read one at a time see the others through state alone
        return _written_out(program)
    for name, _ in program.graphs():
        loop = loops.get(name)
        data = data_nodes(program) if loop is None else _carried(loop)
        for node in data:
            if _mixes(node):
                return f"{node.name} ({node.target})"
    return None


def mask_beside(positions: Input) -> str:
    """The name of the padding mask over the tokens that these positions are of."""
    prefix = "decoder_" if positions.name.startswith("decoder_") else ""
    return f"{prefix}attention_mask"


def _is_causal(node: fx.Node) -> bool:
    if node.target is RECURRENCE:
        return True
    return node.target in (*_TOLD, MASK) and argument(node, "causal") is not False


def _reads(node: fx.Node, loop: Loop | None, mask: str) -> bool:
    """Whether the padding of a node is the input of this name, but for its dtype."""
    value = argument(node, "padding")
    while isinstance(value, fx.Node):
        if value.target in CONVERSIONS:
            value = value.args[0]
        elif value.op == "placeholder" and loop is not None:
            value, loop = loop.resolve(value, 0), None
        else:
            return value.op == "placeholder" and str(value.target) == mask
    return False


def _written_out(program: Program) -> str | None:
    """A cache that no attention op reads, if no mask op says what is read of it."""
    nodes = [n for _, graph in program.graphs() for n in graph.nodes]
    if any(n.target is MASK for n in nodes):
        return None
    for node in nodes:
        if node.target is CACHE:
            readers = [user for item in node.users for user in item.users]
            if not all(r.target in _TOLD for r in readers):
                return f"{node.name}, which no attention op reads,"
    return None


def _carried(loop: Loop) -> list[fx.Node]:
    """The nodes of a body that depend on what it carries."""
    data = set(loop.places[: len(loop.carry)])
    found = []
    for node in loop.body.graph.nodes:
        if node.op == "call_function" and any(n in data for n in node.all_input_nodes):
            data.add(node)
            found.append(node)
    return found


def _mixes(node: fx.Node) -> bool:
    target: Any = node.target
    if target in _TOLD | _KEPT | _LAYOUT or target is ops.loop:
        return False
    times = [n for n in node.all_input_nodes if TIME in shape(n)]
    if not times or "type" not in node.meta:
        return False
    if "conv" in str(target) or "pool" in str(target) or TIME not in shape(node):
        return True
    if target in _ALONG and len(node.args) > 1:
        sizes = shape(times[0])
        dims: Any = node.args[-1] if target is aten.roll.default else node.args[1]
        dims = dims if isinstance(dims, list | tuple) else [dims]
        return any(isinstance(d, int) and sizes[d] == TIME for d in dims)
    return False
