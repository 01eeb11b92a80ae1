"""Let the encoder of an encoder-decoder model run once, and what decoders derive from it alone.

Nodes that do not depend on the decoder's inputs belong to the encoder, and the main graph is cut
there. The values that cross the cut are the encoder's output. The first of them is the last hidden
state; the others, such as keys and values of cross-attentions, follow from it.

Each decoder layer projects the encoder's states to the keys and values of its cross-attention.
These projections use the layer's own weights, so they are in the body of the decoder's loop. They
become a function of their own, which the main graph calls once before the loop. The body takes its
results as per-trip inputs.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from reroll.errors import ProgramError
from reroll.rewrite.ir.matching import shape
from reroll.rewrite.ir.program import Loop, Program
from reroll.rewrite.ir.records import Input
from reroll.rewrite.ir.types import type_of
from reroll.runtime.functions.loops import run_static
from reroll.runtime.lowering.hoisting import OWN_INPUTS, is_size, outer_values, placeholders


def cut(graph: fx.Graph, program: Program) -> dict[str, fx.Graph]:
    """Cut a main graph into encoder and decoder; each part takes the Program's inputs, state last.

    `encode` returns the hidden state. `extend` takes it first and returns the other values that
    cross the cut. `decode` takes all of these first and returns the outputs. Raises ProgramError if
    the values that cross the cut do not follow from one hidden state.
    """
    encoder, decoder = _sides(graph, program.inputs)
    output = graph.output_node()
    outputs: Any = output.args[0]
    # the encoder's values that the decoder or the output reads, without sizes
    crossing = [
        node
        for node in graph.nodes
        if node in encoder
        and not is_size(node)
        and any(u is output or (u in decoder and not is_size(u)) for u in node.users)
    ]
    # the encoder's last hidden state, if it is an output
    hidden = dict(zip(program.outputs, outputs, strict=True)).get("encoder_last_hidden_state")
    if hidden not in encoder:
        hidden = next((n for n in crossing if type_of(n) is not None), None)
    if hidden is None:
        raise ProgramError("the decoder does not read the encoder")
    batch = next(i.type.shape[0] for i in program.inputs if i.role == "data")
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
    decode = _graph(graph, [hidden, *rest], list(outputs), [hidden, *rest, *near])
    data = {n for n in encoder if n.op == "placeholder"}
    for part in (extend, decode):
        late = [n for n in part.nodes if n.op == "placeholder" and n.users]
        late = [n for n in late if n.name in {d.name for d in data - {hidden, *rest}}]
        if late:
            raise ProgramError(
                "the decoder needs more of the encoder than its last hidden state",
                where=late[0].name,
            )
    return {"encode": encode, "extend": extend, "decode": decode}


def has_decoder(inputs: tuple[Input, ...]) -> bool:
    """Whether a model is an encoder and a decoder, from its inputs."""
    return any(i.name.startswith("decoder_") for i in inputs)


def _sides(graph: fx.Graph, inputs: tuple[Input, ...]) -> tuple[set[fx.Node], set[fx.Node]]:
    """Find the nodes of the encoder, which need only its data, and those of the decoder.

    The decoder's nodes need its inputs or its cache.
    """
    data = {i.name for i in inputs if i.role == "data"}
    encoder: set[fx.Node] = set()
    decoder: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            if str(node.target).startswith("decoder_"):
                decoder.add(node)
            elif node.target in data:
                encoder.add(node)
            continue
        is_cache = node.target is getattr and node.args[1] == "layers"
        if is_cache or any(n in decoder for n in node.all_input_nodes):
            decoder.add(node)
        elif any(n in encoder for n in node.all_input_nodes):
            encoder.add(node)
    return encoder, decoder


def _graph(
    whole: fx.Graph, inputs: list[fx.Node], wanted: list[Any], elsewhere: list[fx.Node]
) -> fx.Graph:
    """Build a graph over `inputs` and all inputs that computes the wanted values.

    Sizes of tensors that it does not compute are read from those of `elsewhere`.
    """
    other = {n: _other_size(n, elsewhere) for n in whole.nodes if is_size(n) and elsewhere}
    needed: set[fx.Node] = set()
    stack: list[fx.Node] = []
    fx.node.map_arg(wanted, stack.append)
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
    graph.output(tuple(fx.node.map_arg(wanted, values.__getitem__)))
    return graph


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


# ---- what trips derive from the encoder alone


def split_static_graphs(program: Program, state: fx.Node) -> dict[str, fx.Graph]:
    """Move the static parts out of the bodies, in place; return their graphs by loop."""
    graphs: dict[str, fx.Graph] = {}
    if not has_decoder(program.inputs):
        return graphs
    for loop in program.loops:
        encoded, _ = _sides(program.graph, program.inputs)
        if loop.node in encoded:
            continue
        graph = _split(program, loop, encoded, state)
        if graph is not None:
            graphs[loop.name] = graph
    return graphs


def _split(program: Program, loop: Loop, encoded: set[fx.Node], state: fx.Node) -> fx.Graph | None:
    fixed = {
        placeholder: values[0]
        for placeholder, values in outer_values(loop).items()
        if isinstance(values[0], fx.Node) and values[0] in encoded and len(set(values)) == 1
    }
    static = _static_nodes(loop.body.graph, set(fixed))
    border = [node for node in static if any(user not in static for user in node.users)]
    # sizes are excluded: they are cheap to compute, and are no tensors
    border = [node for node in border if type_of(node) is not None]
    if not border:
        return None
    graph, used = _extract(loop.body.graph, border, static)
    main = program.graph
    with main.inserting_before(loop.node):
        inputs = tuple(fixed[placeholder] for placeholder in used)
        values = main.call_function(run_static, (state, loop.name, inputs))
        columns: list[list[fx.Node]] = [[] for _ in border]
        for number in range(loop.trips * len(border)):
            node = main.call_function(operator.getitem, (values, number))
            node.meta.update(border[number % len(border)].meta)
            columns[number % len(border)].append(node)
    for node, column in zip(border, columns, strict=True):
        placeholder = loop.add_input(node.name, tuple(column))
        placeholder.meta.update(node.meta)
        node.replace_all_uses_with(placeholder, delete_user_cb=lambda user: user not in static)
    loop.body.graph.eliminate_dead_code()
    loop.drop_unused_inputs()
    return graph


def _static_nodes(body: fx.Graph, fixed: set[fx.Node]) -> dict[fx.Node, None]:
    """Find the nodes that depend only on weights and at least one of the fixed inputs."""
    static: dict[fx.Node, None] = {}
    for node in body.nodes:
        if node.op != "call_function" or not node.all_input_nodes:
            continue
        inputs = [n for n in node.all_input_nodes if n.op != "get_attr"]
        if inputs and all(n in fixed or n in static for n in inputs):
            static[node] = None
    return static


def _extract(
    body: fx.Graph, border: list[fx.Node], static: dict[fx.Node, None]
) -> tuple[fx.Graph, list[fx.Node]]:
    """Build a graph that computes the border; return it and the placeholders it reads."""
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    used = [p for p in placeholders(body) if any(user in static for user in p.users)]
    for placeholder in used:
        values[placeholder] = graph.placeholder(placeholder.name)

    def value(node: fx.Node) -> fx.Node:
        if node not in values:
            assert node.op == "get_attr" or node in static
            values[node] = graph.node_copy(node, value)
        return values[node]

    outputs: tuple[Any, ...] = tuple(value(node) for node in border)
    graph.output(outputs)
    return graph, used
