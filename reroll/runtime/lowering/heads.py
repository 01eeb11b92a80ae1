"""Both ends of a model: embeddings instead of tokens, and logits only where they are wanted."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from reroll.rewrite.ir.dtypes import CONVERSIONS
from reroll.rewrite.ir.matching import shape
from reroll.rewrite.ir.ops import EXIT_LINEAR
from reroll.rewrite.ir.program import Program
from reroll.runtime.functions.loops import keep_positions, look_up
from reroll.runtime.lowering.modules import Reading

aten = torch.ops.aten

# what makes something of the size of the tokens
_SIZED = {
    aten.ones_like.default, aten.zeros_like.default, aten.full_like.default, aten.new_ones.default,
    aten.new_zeros.default, aten.new_full.default,
}  # fmt: skip
# what gives the same tokens in another form
_ALIKE = {aten.reshape.default, aten.to.dtype, aten.contiguous.default, aten.unsqueeze.default}

# what may stand between the last matrix and the logits: one tensor in, position by position
_POINTWISE = {
    aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.add.Tensor,
    aten.add.Scalar, aten.tanh.default, aten.neg.default, *CONVERSIONS,
}  # fmt: skip


def logits_head(program: Program) -> fx.Node | None:
    """The linear node that makes the logits of every position, if there is such a one.

    Where exits have heads of their own, it is an `exit_linear`.
    """
    if "logits" not in program.outputs:
        return None
    output = next(iter(reversed(program.graph.nodes)))
    node = output.args[0][program.outputs.index("logits")]
    while isinstance(node, fx.Node) and node.target in _POINTWISE and len(node.users) == 1:
        tensors = [n for n in node.all_input_nodes if n.op != "get_attr"]
        if len(tensors) != 1 or len(shape(tensors[0])) != 3:
            return None
        node = tensors[0]
    if not isinstance(node, fx.Node) or node.target not in (aten.linear.default, EXIT_LINEAR):
        return None
    hidden = shape(node.args[0])
    return node if len(node.users) == 1 and len(hidden) == 3 else None


def keep_before_head(program: Program, state: fx.Node) -> bool:
    """Drop positions before the head's matrix, in place; False if there is no head to do it at."""
    head = logits_head(program)
    if head is None:
        return False
    hidden = head.args[0]
    with program.graph.inserting_before(head):
        kept = program.graph.call_function(keep_positions, (hidden, state))
        if head.target is EXIT_LINEAR:
            depth = program.graph.call_function(keep_positions, (head.args[1], state))
            head.update_arg(1, depth)
    head.update_arg(0, kept)
    return True


def head_path(program: Program, readings: Mapping[str, Reading]) -> str | None:
    """The module that makes the logits."""
    head = logits_head(program)
    weight = head.args[1] if head is not None else None
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None
    return readings[str(weight.target)].linear


def take_embeddings(
    program: Program, readings: Mapping[str, Reading], state: fx.Node
) -> tuple[str | None, bool]:
    """Let a caller give embeddings instead of tokens, in place.

    Returns the tokens' module, and whether embeddings can stand for the tokens: not where these are
    read for something else as well.
    """
    main = next(i.name for i in program.inputs if i.role == "data")
    for node in program.graph.nodes:
        if node.target is not aten.embedding.default:
            continue
        table, ids = node.args[:2]
        if table.op != "get_attr" or ids.op != "placeholder" or ids.target != main:
            continue
        path = readings[str(table.target)].lookup
        if path is not None:
            node.target, node.args, node.kwargs = look_up, (table, ids, state), {}
        return path, path is not None and not _is_read(ids, node)
    return None, False


def _is_read(ids: fx.Node, lookup: fx.Node) -> bool:
    """Whether token ids are used beside one lookup, for more than their size.

    Even a comparison counts: a model that looks for a token does something else without tokens.
    """
    stack = [ids]
    for node in stack:
        for user in node.users:
            if user is lookup or user.target in _SIZED or _is_size(user):
                continue
            if user.target not in _ALIKE:
                return True
            stack.append(user)
    return False


def _is_size(node: fx.Node) -> bool:
    """Whether a node is a size of its argument, or its device."""
    return node.target in (aten.sym_size.int, getattr, "size")
