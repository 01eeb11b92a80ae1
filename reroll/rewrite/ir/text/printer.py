"""Format a Program as readable text that parses back to the same Program.

The grammar; every construct is on a line of its own, and `#` starts a comment line:

    program     'program dtype=' DTYPE ['halves=[' DTYPE, ... ']'] 'model=' STRING, then the lines
                and sections below
    input       'input' NAME ':' type 'role=' NAME
    output      'output' NAME
    default     'default' NAME '(' %input ':' type, ... ') {' statements '}'
    graph       'graph main(' %x, ... ') {' statements '}'
    body        'body' NAME '(' %x ':' type, ... ') period=' INT '{' statements '}'
    weights     'weights {' the lines of `table_to_text` '}'
    reference   'reference {' the lines of `table_to_text` '}'
    origin      'origin {' the members of a JSON object '}'

    statement   %x '=' op '(' value, ... , name=value, ... ')' [':' type]
                %x '=' 'loop' NAME '(' carry ')' ['inputs(' value, ... ')'] 'trips=' INT
                'return' value, ...
    op          'aten.view' (the default overload), 'aten.add.Tensor', 'reroll.rms_norm', or one of
                `op_names.FUNCTIONS`
    value       %x, @weight, 1, 1.0, -inf, nan, true, none, "text", [value, ...], (value, ...),
                a dtype (f32, complex64), a layout or a memory format, device("cpu")
    type        DTYPE '[' 2, b, "2*s", ... ']' ['hidden(' NAME, ... ')'] ['weights(' NAME, ... ')'],
                the outputs that the value or the attention's weights are an entry of

    NAME        letters, digits and _ . * - /, or a JSON string

The `get_attr` nodes of a graph are not written: a weight is an argument, `@model.norm.weight`.
Parsing creates one node for each weight of a graph, before its first use.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import fx

from reroll.rewrite.ir import ops
from reroll.rewrite.ir.hidden import STATES, WEIGHTS, marks
from reroll.rewrite.ir.text.literals import Namer, bare, node_name, type_to_text, value_to_text
from reroll.rewrite.ir.text.op_names import op_name
from reroll.rewrite.ir.text.origin_json import origin_to_json
from reroll.rewrite.ir.types import type_of
from reroll.rewrite.ir.weights import WeightTable, table_to_text

if TYPE_CHECKING:
    from reroll.rewrite.ir.program import Program


def to_text(program: Program) -> str:
    """Format a Program. Values that no Program may hold print with a `?` and do not parse back."""
    origin = origin_to_json(program.origin)
    # the model is in the first line
    model = origin.pop("model")
    halves = f" halves={value_to_text(list(program.halves))}" if program.halves else ""
    head = f"program dtype={_dtype(program)}{halves} model={json.dumps(model)}"
    lines = [head, *graph_lines(program)]
    lines += _table("weights", program.weights)
    lines += _table("reference", program.reference) if program.reference else []
    return "\n".join([*lines, "", f"origin {json.dumps(origin, indent=2)}", ""])


def graph_lines(program: Program) -> Iterator[str]:
    """Yield the lines of a Program's inputs, outputs, defaults, graph and bodies."""
    for item in program.inputs:
        yield f"input {bare(item.name)} : {type_to_text(item.type)} role={bare(item.role)}"
    for name in program.outputs:
        yield f"output {bare(name)}"
    for item in program.inputs:
        if item.default is not None:
            yield from ("", f"default {bare(item.name)}({_placeholders(item.default)}) {{")
            yield from (*statements(item.default), "}")
    placeholders = ", ".join(f"%{n.name}" for n in program.graph.nodes if n.op == "placeholder")
    yield from ("", f"graph main({placeholders}) {{", *statements(program.graph), "}")
    for name, body in program.bodies.items():
        yield from ("", f"body {bare(name)}({_placeholders(body.graph)}) period={body.period} {{")
        yield from (*statements(body.graph), "}")


def _placeholders(graph: fx.Graph) -> str:
    return ", ".join(f"%{n.name}{_type(n)}" for n in graph.nodes if n.op == "placeholder")


def _table(section: str, table: WeightTable) -> list[str]:
    lines = table_to_text(table).splitlines()
    return ["", f"{section} {{", *(f"  {line}" for line in lines), "}"]


def statements(graph: fx.Graph) -> Iterator[str]:
    """Yield the statements of a graph."""
    for node in graph.nodes:
        if node.op not in ("placeholder", "get_attr"):
            yield f"  {node_to_text(node)}{_type(node)}"


def node_to_text(node: fx.Node, name: Namer = node_name) -> str:
    """Format a node as a statement without its type; `name` names nodes."""
    if node.op == "output":
        result = node.args[0] if node.args else None
        values = result if isinstance(result, tuple) else (result,)
        return f"return {_values(values, name)}".rstrip()
    return f"{name(node)} = {_call(node, name)}"


def _call(node: fx.Node, name: Namer) -> str:
    if node.op != "call_function":
        return f"?{node.op}({node.target})"
    if node.target is ops.loop and _is_plain_loop(node):
        body, carry, inputs, trips = node.args
        inputs_text = f" inputs({_values(inputs, name)})" if inputs else ""
        return f"loop {bare(str(body))}({_values(carry, name)}){inputs_text} trips={trips}"
    arguments = [value_to_text(value, name) for value in node.args]
    arguments += [f"{key}={value_to_text(value, name)}" for key, value in node.kwargs.items()]
    return f"{op_name(node.target) or f'?{node.target}'}({', '.join(arguments)})"


def _is_plain_loop(node: fx.Node) -> bool:
    kinds = tuple(map(type, node.args))
    return kinds == (str, tuple, tuple, int) and not node.kwargs


def _values(values: Any, name: Namer) -> str:
    return ", ".join(value_to_text(value, name) for value in values)


def _type(node: fx.Node) -> str:
    type_ = type_of(node)
    if type_ is None:
        return ""
    marked = ""
    for word, among in (("hidden", STATES), ("weights", WEIGHTS)):
        if names := marks(node, among):
            marked += f" {word}({', '.join(names)})"
    return f" : {type_to_text(type_)}{marked}"


def _dtype(program: Program) -> str:
    return value_to_text(program.dtype)
