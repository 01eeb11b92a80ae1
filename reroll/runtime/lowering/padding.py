"""Padding masks as the lowered module reads them: checked once per forward, and often None.

A caller may leave the padding mask out, and one that hides nothing costs as much as any other. So
the attentions of a Program read one boolean mask per input, or None. The input itself is made only
where something else depends on it, such as positions that are counted from it. For packed rows,
attentions read the `Documents` in place of the mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from reroll.rewrite.analysis.mixing import mask_beside
from reroll.rewrite.analysis.state_plan import MASKED
from reroll.rewrite.ir.dtypes import CONVERSIONS
from reroll.rewrite.ir.matching import argument
from reroll.rewrite.ir.ops import MASK, RECURRENCE
from reroll.rewrite.ir.program import Program
from reroll.runtime.functions.documents import Documents
from reroll.runtime.functions.masks import visible_tokens
from reroll.runtime.lowering.hoisting import placeholders


def valid_tokens(mask: Tensor | None, state: Any) -> Tensor | Documents | None:
    """Return the documents of a forward over packed rows, else the mask of `visible_tokens`."""
    return visible_tokens(mask) if state.documents is None else state.documents


def tokens_of(mask: Tensor) -> int:
    """Return the number of tokens of a padding mask: [batch, tokens], or 4-d.

    A 4-d mask has a row of keys for each query.
    """
    return mask.shape[-1]


# the functions that compute the padding that attentions read
READERS = (visible_tokens, valid_tokens)


def read_padding(program: Program, state: fx.Node) -> frozenset[str]:
    """Let attentions read padding through one of `READERS`, changing the graphs in place.

    `state` is the node of the main graph's `ForwardState`. Returns the names of the padding inputs
    that are still needed as tensors.
    """
    nodes = {str(n.target): n for n in placeholders(program.graph)}
    inputs = [nodes[i.name] for i in program.inputs if i.role == "padding"]
    packed = {mask_beside(i) for i in program.inputs if i.role == "positions"}
    for node in inputs:
        for user in list(node.users):
            if user.target is torch.ops.aten.sym_size.int and user.args[1] == 1:
                user.target, user.args = tokens_of, (node,)
        _read(program, node, state if str(node.target) in packed else None)
    return frozenset(str(n.target) for n in inputs if any(u.target not in READERS for u in n.users))


def _read(program: Program, padding: fx.Node, state: fx.Node | None) -> None:
    same = [padding]
    for node in same:
        same.extend(u for u in node.users if u.target in CONVERSIONS)
    with program.graph.inserting_after(state or padding):
        if state is None:
            checked = program.graph.call_function(visible_tokens, (padding,))
        else:
            checked = program.graph.call_function(valid_tokens, (padding, state))
    loops = {loop.node: loop for loop in program.loops}
    for node in same:
        for user in list(node.users):
            if _hides(user, node):
                user.replace_input_with(node, checked)
            elif user in loops:
                loop = loops[user]
                inner = loop.places[len(loop.carry) :]
                user.update_arg(
                    2,
                    tuple(
                        checked
                        if value is node and all(_hides(u, place) for u in place.users)
                        else value
                        for value, place in zip(loop.inputs, inner, strict=True)
                    ),
                )
    for node in reversed(same[1:]):
        if not node.users:
            program.graph.erase_node(node)


def _hides(user: fx.Node, node: fx.Node) -> bool:
    """Whether a node takes another one as its padding."""
    takes = user.target in (*MASKED, RECURRENCE, MASK)
    return takes and argument(user, "padding") is node
