"""Cut the graph of an encoder-decoder model in two, so that the encoder runs once.

Nodes that do not depend on the decoder's inputs belong to the encoder. The values that cross the
cut are the encoder's output. The first of them is the last hidden state; the others, such as keys
and values of cross-attentions, follow from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from reroll.errors import ProgramError
from reroll.rewrite.ir.matching import shape
from reroll.rewrite.ir.records import Input
from reroll.rewrite.ir.types import type_of
from reroll.runtime.lowering.hoisting import OWN_INPUTS
from reroll.runtime.lowering.sizes import is_size


@dataclass
class Parts:
    """Graphs of an encoder-decoder model; each takes the Program's inputs, and the state last.

    `encode` returns the hidden state. `extend` takes it first and returns the other values that
    cross the cut. `decode` takes all of these first and returns the outputs.
    """

    encode: fx.Graph
    extend: fx.Graph
    decode: fx.Graph


def cut(graph: fx.Graph, inputs: tuple[Input, ...], hidden_output: int | None) -> Parts:
    """Cut a main graph into encoder and decoder.

    `hidden_output` is the index of the output that is the encoder's hidden state, or None. Raises
    ProgramError if the values that cross the cut do not follow from one hidden state.
    """
    roles = {i.name: i.role for i in inputs}
    encoder, decoder = _sides(graph, roles)
    output = next(iter(reversed(graph.nodes)))
    crossing = _crossing(graph, encoder, decoder, output)
    hidden = output.args[0][hidden_output] if hidden_output is not None else None
    if hidden not in encoder:
        hidden = next((n for n in crossing if type_of(n) is not None), None)
    if hidden is None:
        raise ProgramError("the decoder does not read the encoder")
    batch = next(i.type.shape[0] for i in inputs if i.role == "data")
    if batch in shape(hidden)[1:]:
        raise ProgramError(
            f"the decoder reads states {list(shape(hidden))} of the encoder, whose rows are not "
            "those of the batch",
            where=hidden.name,
            hint="such a model cannot be lowered",
        )
    rest = [n for n in crossing if n is not hidden]
    near = [n for n in graph.nodes if n.op == "placeholder" and n in decoder]
    encode = _graph(graph, [], [hidden], [])
    extend = _graph(graph, [hidden], rest, [hidden])
    decode = _graph(graph, [hidden, *rest], list(output.args[0]), [hidden, *rest, *near])
    data = {n for n in encoder if n.op == "placeholder"}
    for part in (extend, decode):
        late = [n for n in part.nodes if n.op == "placeholder" and n.users]
        late = [n for n in late if n.name in {d.name for d in data - {hidden, *rest}}]
        if late:
            raise ProgramError(
                "the decoder needs more of the encoder than its last hidden state",
                where=late[0].name,
            )
    return Parts(encode, extend, decode)


def _sides(graph: fx.Graph, roles: dict[str, str]) -> tuple[set[fx.Node], set[fx.Node]]:
    """Find the nodes of the encoder, which need only its data, and those of the decoder.

    The decoder's nodes need its inputs or its cache.
    """
    encoder: set[fx.Node] = set()
    decoder: set[fx.Node] = set()
    for node in graph.nodes:
        name = str(node.target)
        if node.op == "placeholder":
            if name.startswith("decoder_"):
                decoder.add(node)
            elif roles.get(name) == "data":
                encoder.add(node)
        elif _is_cache(node) or any(n in decoder for n in node.all_input_nodes):
            decoder.add(node)
        elif any(n in encoder for n in node.all_input_nodes):
            encoder.add(node)
    return encoder, decoder


def _is_cache(node: fx.Node) -> bool:
    return node.target is getattr and node.args[1] == "layers"


def _crossing(
    graph: fx.Graph, encoder: set[fx.Node], decoder: set[fx.Node], output: fx.Node
) -> list[fx.Node]:
    """Find the encoder's values that the decoder or the output reads, without sizes."""
    outputs = set(output.all_input_nodes)
    return [
        node
        for node in graph.nodes
        if node in encoder
        and not is_size(node)
        and (node in outputs or any(u in decoder and not is_size(u) for u in node.users))
    ]


def _graph(
    whole: fx.Graph, inputs: list[fx.Node], wanted: list[Any], elsewhere: list[fx.Node]
) -> fx.Graph:
    """Build a graph over `inputs` and all inputs that computes the wanted values.

    Sizes of tensors that it does not compute are read from those of `elsewhere`.
    """
    other = {n: _other_size(n, elsewhere) for n in whole.nodes if is_size(n) and elsewhere}
    needed: set[fx.Node] = set()
    stack = [n for value in wanted for n in _nodes_in(value)]
    while stack:
        node = stack.pop()
        if node not in needed and node not in inputs and node.op != "placeholder":
            needed.add(node)
            substitute = other.get(node)
            stack.extend(node.all_input_nodes if substitute is None else [substitute[0]])
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in [*inputs, *(n for n in whole.nodes if n.op == "placeholder")]:
        if node not in values:
            new = graph.create_node("placeholder", "x", name=node.name)
            new.target = str(node.target) if node.target in OWN_INPUTS else new.name
            values[node] = new
    for node in whole.nodes:
        if node not in needed:
            continue
        substitute = other.get(node)
        if substitute is None:
            values[node] = graph.node_copy(node, values.__getitem__)
            continue
        tensor, dim = substitute
        if node.op == "call_method":
            values[node] = graph.call_method("size", (values[tensor], dim))
        else:
            values[node] = graph.call_function(getattr, (values[tensor], "device"))
    graph.output(tuple(fx.node.map_arg(value, values.__getitem__) for value in wanted))
    return graph


def _nodes_in(value: Any) -> list[fx.Node]:
    nodes: list[fx.Node] = []
    fx.node.map_arg(value, nodes.append)
    return nodes


def _other_size(node: fx.Node, tensors: list[fx.Node]) -> tuple[fx.Node, Any] | None:
    """Find one of `tensors` and its dimension of the same name; for a device, return any tensor."""
    source = node.args[0]
    if node.target is getattr:
        return tensors[0], None
    if node.op != "call_method" or not isinstance(source, fx.Node):
        return None
    type_ = type_of(source)
    name = None if type_ is None else type_.shape[node.args[1]]  # type: ignore[index]
    for tensor in tensors:
        other = type_of(tensor)
        if name is not None and other is not None and name in other.shape:
            return tensor, other.shape.index(name)
    return None
