"""Input and output of a model: embeddings instead of tokens, and logits only where wanted."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from reroll.rewrite.ir.ops import EXIT_LINEAR
from reroll.rewrite.ir.parts import logits_head
from reroll.rewrite.ir.program import Program, copy, drop_unused
from reroll.runtime.functions.hidden import note
from reroll.runtime.functions.loops import keep_positions, look_up, run_loop
from reroll.runtime.lowering.hoisting import is_size
from reroll.runtime.lowering.modules import Reading

aten = torch.ops.aten

# ops that read only the size of the tokens
_SIZED = {
    aten.ones_like.default, aten.zeros_like.default, aten.full_like.default, aten.new_ones.default,
    aten.new_zeros.default, aten.new_full.default,
}  # fmt: skip
# ops that return the same tokens in another shape or dtype
_ALIKE = {aten.reshape.default, aten.to.dtype, aten.contiguous.default, aten.unsqueeze.default}

# hidden states of which the last is what the head reads, up to a scale
_LAST = {"hidden_states", "decoder_hidden_states"}


def keep_before_head(program: Program, state: fx.Node) -> bool:
    """Drop positions before the head's matrix product, in place; return whether there is a head."""
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
    """Return the path of the module that computes the logits, or None."""
    head = logits_head(program)
    weight = head.args[1] if head is not None else None
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None
    return readings[str(weight.target)].linear


def backbone_part(graph: fx.Graph) -> fx.Graph:
    """Extract the part of a runnable graph that computes the last hidden state.

    The graph is the main one, or a decoder's, with a head that keeps positions. The last hidden
    state is the last value marked as a hidden state behind all loops, or else the head's input.
    """
    graph = copy(graph)
    last = None
    for node in graph.nodes:
        if node.target is run_loop:
            last = None
        elif node.target is note and _LAST.intersection(node.args[2]):
            last = node
        elif node.target is keep_positions:
            last = last or node.args[0]
            break
    output = next(iter(reversed(graph.nodes)))
    output.args = ((last,),)
    drop_unused(graph)
    return graph


def without_factors(program: Program, readings: Mapping[str, Mapping[str, Reading]]) -> Program:
    """Leave factors of embeddings to the modules that look up: a lookup takes its product's place.

    `readings` are those of each graph.
    """
    program = program.edit()
    for name, graph in program.graphs():
        for lookup in graph.find_nodes(op="call_function", target=aten.embedding.default):
            reading = readings[name].get(str(getattr(lookup.args[0], "target", "")))
            if reading is not None and reading.scaled:
                (product,) = lookup.users
                product.target, product.args = lookup.target, lookup.args
                product.kwargs = lookup.kwargs
                graph.erase_node(lookup)
        drop_unused(graph)
    return program


def take_embeddings(
    program: Program, readings: Mapping[str, Reading], state: fx.Node
) -> tuple[dict[str, str], frozenset[str]]:
    """Let a caller give embeddings instead of tokens, in place.

    Returns the path of the module that looks up the tokens of an input, by the input's name, and
    the inputs that embeddings can replace. They cannot where the tokens are also read for another
    purpose, nor where the original scales embeddings and the module of the table does not.
    """
    tokens = {i.name for i in program.inputs if i.role == "data"}
    paths: dict[str, str] = {}
    replaced = set()
    for node in program.graph.find_nodes(op="call_function", target=aten.embedding.default):
        table, ids = node.args[:2]
        if table.op != "get_attr" or ids.op != "placeholder" or ids.target not in tokens:
            continue
        reading = readings[str(table.target)]
        path = reading.lookup
        if path is None or ids.target in paths:
            continue
        paths[ids.target] = path
        node.target, node.args, node.kwargs = look_up, (table, ids, ids.target, state), {}
        known = reading.scaled or not program.origin.scales_embeddings
        if known and not _is_read(ids, node):
            replaced.add(ids.target)
    return paths, frozenset(replaced)


def _is_read(ids: fx.Node, lookup: fx.Node) -> bool:
    """Whether token ids are used for more than one lookup and their size.

    Even a comparison counts: a model that looks for a token cannot do so without tokens.
    """
    stack = [ids]
    for node in stack:
        for user in node.users:
            if user is lookup or user.target in _SIZED or is_size(user):
                continue
            if user.target not in _ALIKE:
                return True
            stack.append(user)
    return False
