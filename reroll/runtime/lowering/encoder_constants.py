"""Compute values that decoder layers derive from the encoder alone once, not at every token.

In an encoder-decoder model, each decoder layer projects the encoder's states to the keys and values
of its cross-attention. These projections use the layer's own weights, so they are in the body of
the decoder's loop. They become a function of their own, which the main graph calls once before the
loop. The body takes its results as per-trip inputs.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from reroll.rewrite.ir.program import Loop, Program
from reroll.rewrite.ir.types import type_of
from reroll.runtime.functions.loops import run_static
from reroll.runtime.lowering.hoisting import outer_values, placeholders


def split_static_graphs(program: Program, state: fx.Node) -> dict[str, fx.Graph]:
    """Move the static parts out of the bodies, in place; return their graphs by loop."""
    graphs = {}
    for loop in program.loops:
        encoded = encoder_nodes(program)
        if loop.node in encoded:
            continue
        graph = _split(program, loop, encoded, state)
        if graph is not None:
            graphs[loop.name] = graph
    return graphs


def is_decoder_input(name: str) -> bool:
    """Whether an input belongs to the decoder of an encoder-decoder model."""
    return name.startswith("decoder_")


def encoder_nodes(program: Program) -> set[fx.Node]:
    """Find the main graph's nodes that depend on the encoder's data and not on the decoder."""
    if not any(is_decoder_input(i.name) for i in program.inputs):
        return set()
    roles = {i.name: i.role for i in program.inputs}
    decoder: set[fx.Node] = set()
    encoder: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder" and str(node.target) in roles:
            if is_decoder_input(str(node.target)):
                decoder.add(node)
            elif roles[str(node.target)] == "data":
                encoder.add(node)
        elif any(n in decoder for n in node.all_input_nodes):
            decoder.add(node)
        elif any(n in encoder for n in node.all_input_nodes):
            encoder.add(node)
    return encoder


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
    used = [
        placeholder
        for placeholder in placeholders(body)
        if any(user in static for user in placeholder.users)
    ]
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
