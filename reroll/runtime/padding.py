"""Padding masks as the lowered module reads them: checked once per forward, and often absent.

A caller need not give a padding mask, and one that hides nothing costs as much as any other. So the
attentions of a Program read one boolean mask per input, or None, and the input itself is made up
only where something else depends on it, such as positions that are counted from it.
"""

from __future__ import annotations

import torch
from torch import fx

from reroll.rewrite.program import Program
from reroll.rewrite.raising.matching import argument
from reroll.runtime.caches import MASKED, RECURRENCE
from reroll.runtime.hoisting import placeholders
from reroll.runtime.masks import visible_tokens

TO = torch.ops.aten.to.dtype


def read_padding(program: Program) -> frozenset[str]:
    """Let attentions read padding through `visible_tokens`, changing the graphs in place.

    Returns the names of the padding inputs that are still needed as tensors.
    """
    nodes = {str(n.target): n for n in placeholders(program.graph)}
    inputs = [nodes[i.name] for i in program.inputs if i.role == "padding"]
    for node in inputs:
        _read(program, node)
    program.graph.eliminate_dead_code()
    return frozenset(
        str(n.target) for n in inputs if any(u.target is not visible_tokens for u in n.users)
    )


def _read(program: Program, given: fx.Node) -> None:
    same = [given]
    for node in same:
        same.extend(u for u in node.users if u.target is TO)
    with program.graph.inserting_after(given):
        checked = program.graph.call_function(visible_tokens, (given,))
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
                        checked if value is node and _is_padding_only(place) else value
                        for value, place in zip(loop.inputs, inner, strict=True)
                    ),
                )


def _is_padding_only(node: fx.Node) -> bool:
    return all(_hides(user, node) for user in node.users)


def _hides(user: fx.Node, node: fx.Node) -> bool:
    """Whether a node takes another one as padding."""
    takes = user.target in (*MASKED, RECURRENCE)
    return takes and argument(user, "padding") is node
