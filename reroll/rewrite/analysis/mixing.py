"""Ops other than attention and recurrences that mix the tokens of a row, such as convolutions.

Such an op mixes the documents of a packed row, because it is not told where they begin.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from reroll.rewrite.analysis.state_plan import CONVOLVED, behind_cache, readers
from reroll.rewrite.capture.rolling.roll import data_nodes
from reroll.rewrite.ir import ops
from reroll.rewrite.ir.dtypes import CONVERSIONS
from reroll.rewrite.ir.matching import argument, shape
from reroll.rewrite.ir.ops import (
    ATTENTION,
    ATTENTION_MASS,
    BIDIRECTIONAL,
    CACHE,
    MASK,
    RECENT,
    RECURRENCE,
)
from reroll.rewrite.ir.program import Loop, Program
from reroll.rewrite.ir.records import Input

aten = torch.ops.aten

# the tokens' dimension
TIME = "s"

# ops that keep the documents of a row apart
_TOLD = {ATTENTION, ATTENTION_MASS, RECURRENCE}
_KEPT = {CACHE, BIDIRECTIONAL, MASK}
# ops that move tokens inside a tensor without changing their values
_LAYOUT = {
    aten.reshape.default, aten.view.default, aten.flatten.using_ints, aten.unflatten.int,
}  # fmt: skip
# ops that keep the shape and mix along the dimension in their second argument
_ALONG = {
    aten.cumsum.default, aten.cumprod.default, aten.logcumsumexp.default, aten.flip.default,
    aten.roll.default, aten.softmax.int, aten.log_softmax.int, aten.sort.default,
}  # fmt: skip


def other_mixing(program: Program) -> str | None:
    """Describe the first op that would mix the documents of a packed row; None if there is none."""
    item = next((i for i in program.inputs if i.role == "positions"), None)
    if item is None:
        return None
    loops = {loop.name: loop for loop in program.loops}
    for name, graph in program.graphs():
        for node in graph.nodes:
            if node.target in CONVOLVED:
                return f"{node.name}, a short convolution,"
            if _is_causal(node) and not _reads(node, loops.get(name), mask_beside(item)):
                return f"{node.name}, which does not read the padding mask itself,"
    if program.has_past:
        # in decoding, a token depends on earlier ones through state alone
        return _written_out(program)
    for name, _ in program.graphs():
        loop = loops.get(name)
        data = data_nodes(program) if loop is None else _carried(loop)
        for node in data:
            if _mixes(node):
                return f"{node.name} ({node.target})"
    return None


def branch_mixing(program: Program) -> str | None:
    """Describe the first op that would mix the branches of a tree of tokens; None if none would.

    Attentions, recurrences and short convolutions are told the tree. What goes by the place of a
    token among others is not.
    """
    counted = any(item.counts for item in program.inputs)
    for _, graph in program.graphs():
        for node in graph.nodes:
            if node.target is RECENT:
                return f"{node.name}, a convolution that is written out,"
            if node.target is MASK:
                return f"{node.name}, a mask that is written out,"
            if node.target is CACHE and None in readers(node):
                return f"{node.name}, which no attention op reads,"
            if node.target in (ATTENTION, ATTENTION_MASS) and _has_places(node):
                return f"the bias of {node.name}, which goes by places,"
            if node.target is aten.cumsum.default and not counted and program.has_past:
                return f"{node.name}, which counts tokens,"
    return None


def _has_places(node: fx.Node) -> bool:
    """Whether an attention behind a cache has a bias."""
    return argument(node, "bias") is not None and behind_cache(argument(node, "k")) is not None


def mask_beside(positions: Input) -> str:
    """Return the name of the padding mask that belongs to an input of positions."""
    prefix = "decoder_" if positions.name.startswith("decoder_") else ""
    return f"{prefix}attention_mask"


def _is_causal(node: fx.Node) -> bool:
    if node.target is RECURRENCE:
        return True
    return node.target in (*_TOLD, MASK) and argument(node, "causal") is not False


def _reads(node: fx.Node, loop: Loop | None, mask: str) -> bool:
    """Whether the padding mask of a node is the input named `mask`, up to conversions of dtype."""
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
    """Describe the first cache with a reader that is no attention op; None if a mask op exists."""
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
    """Return the nodes of a body that depend on its carry."""
    data = set(loop.places[: len(loop.carry)])
    carried = []
    for node in loop.body.graph.nodes:
        if node.op == "call_function" and any(n in data for n in node.all_input_nodes):
            data.add(node)
            carried.append(node)
    return carried


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
