"""Parse the statements of one graph and build its `fx.Graph`."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from reroll.errors import ProgramError, located
from reroll.rewrite.ir import ops
from reroll.rewrite.ir.hidden import STATES, WEIGHTS, mark
from reroll.rewrite.ir.records import TensorType
from reroll.rewrite.ir.text.cursor import Cursor, NodeRef, WeightRef
from reroll.rewrite.ir.text.op_names import LOOP, resolve
from reroll.rewrite.ir.types import set_type


@dataclass(frozen=True)
class Placeholder:
    """Input of a graph: the name of its node, the name of the input, and its type."""

    name: str
    target: str
    type: TensorType | None
    hidden: tuple[str, ...] = ()


@dataclass(frozen=True)
class Statement:
    """Line of a graph. `name` is "" for the return statement."""

    line: int
    name: str
    target: Callable[..., Any] | None
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    type: TensorType | None = None
    hidden: tuple[str, ...] = ()


def read_statement(number: int, text: str) -> Statement:
    """Parse one line of a graph; ProgramError if it is not a statement."""
    cursor = Cursor(text)
    if cursor.accept("return"):
        values: list[Any] = []
        while cursor.token_type != "end":
            values.append(cursor.value())
            if cursor.token_type != "end":
                cursor.expect(",")
        return Statement(number, "", None, (tuple(values),))
    name = cursor.node()
    cursor.expect("=")
    kwargs: dict[str, Any] = {}
    if cursor.accept(LOOP):
        target, args = ops.loop, _loop(cursor)
    else:
        target = resolve(cursor.take("word", "the name of an op"))
        args, kwargs = _arguments(cursor)
    type_, hidden = read_type(cursor)
    cursor.end()
    return Statement(number, name, target, args, kwargs, type_, hidden)


def read_type(cursor: Cursor) -> tuple[TensorType | None, tuple[str, ...]]:
    """Read a value's type, if there is one, and the outputs that the value is an entry of."""
    if not cursor.accept(":"):
        return None, ()
    type_, names = cursor.tensor_type(), []
    for word, among in (("hidden", STATES), ("weights", WEIGHTS)):
        if not cursor.accept(word):
            continue
        cursor.expect("(")
        while True:
            names.append(cursor.name())
            if names[-1] not in among:
                raise ProgramError(f"{word}(...) names entries of {', '.join(among)}")
            if cursor.accept(")"):
                break
            cursor.expect(",")
    return type_, tuple(names)


def _loop(cursor: Cursor) -> tuple[Any, ...]:
    body = cursor.name()
    cursor.expect("(")
    carry = tuple(cursor.values(")")[0])
    inputs: tuple[Any, ...] = ()
    if cursor.accept("inputs"):
        cursor.expect("(")
        inputs = tuple(cursor.values(")")[0])
    cursor.expect("trips")
    cursor.expect("=")
    return body, carry, inputs, cursor.integer()


def _arguments(cursor: Cursor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    cursor.expect("(")
    while not cursor.accept(")"):
        key = cursor.keyword()
        if key is not None:
            if key in kwargs:
                raise ProgramError(f"the argument {key!r} is given twice")
            kwargs[key] = cursor.value()
        elif kwargs:
            cursor.fail("an argument with a name")
        else:
            args.append(cursor.value())
        if cursor.token != ")":
            cursor.expect(",")
    return tuple(args), kwargs


def build_graph(
    placeholders: Sequence[Placeholder], statements: Sequence[Statement], first: int, last: int
) -> tuple[fx.Graph, dict[fx.Node, int]]:
    """Build the graph; return it with the line of each node.

    `first` and `last` are the first and last line of the graph. Raises ProgramError if a node is
    defined twice, is used before its definition, or if there is not exactly one return at the end.
    """
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    lines: dict[fx.Node, int] = {}

    def define(name: str, line: int, node: fx.Node, value: Placeholder | Statement) -> None:
        if name in nodes:
            before = lines[nodes[name]]
            with located(f"line {line}"):
                raise ProgramError(f"%{name} is defined twice, first in line {before}")
        nodes[name], lines[node] = node, line
        set_type(node, value.type)
        mark(node, value.hidden)

    for placeholder in placeholders:
        node = graph.create_node("placeholder", placeholder.target, name=placeholder.name)
        define(placeholder.name, first, node, placeholder)
    # all nodes first, without arguments, so that `get_attr` nodes cannot take their names
    for i, statement in enumerate(statements, 1):
        if not statement.name:
            if i < len(statements):
                raise ProgramError("nothing may follow a return", f"line {statements[i].line}")
            lines[graph.create_node("output", "output", name="output")] = statement.line
            break
        assert statement.target is not None
        node = graph.create_node("call_function", statement.target, name=statement.name)
        define(statement.name, statement.line, node, statement)
    else:
        raise ProgramError("a graph must end with a return", where=f"line {last}")
    _bind(graph, statements, nodes, lines, {p.name for p in placeholders})
    return graph, lines


def _bind(
    graph: fx.Graph,
    statements: Sequence[Statement],
    nodes: Mapping[str, fx.Node],
    lines: dict[fx.Node, int],
    defined: set[str],
) -> None:
    """Set the arguments of the nodes, and add `get_attr` nodes for weights."""
    weights: dict[str, fx.Node] = {}

    def bound(value: Any, user: fx.Node) -> Any:
        if isinstance(value, NodeRef):
            if value.name not in defined:
                raise _undefined(value.name, nodes, lines, defined)
            return nodes[value.name]
        if isinstance(value, WeightRef):
            if value.name not in weights:
                with graph.inserting_before(user):
                    weights[value.name] = graph.create_node("get_attr", value.name)
                lines[weights[value.name]] = lines[user]
            return weights[value.name]
        if isinstance(value, list):
            return [bound(item, user) for item in value]
        return tuple(bound(v, user) for v in value) if isinstance(value, tuple) else value

    for statement in statements:
        node = nodes[statement.name] if statement.name else graph.output_node()
        with located(f"line {statement.line}"):
            node.args = bound(statement.args, node)
            node.kwargs = {key: bound(value, node) for key, value in statement.kwargs.items()}
        defined.add(statement.name)


def _undefined(
    name: str, nodes: Mapping[str, fx.Node], lines: Mapping[fx.Node, int], defined: set[str]
) -> ProgramError:
    if name in nodes:
        return ProgramError(
            f"%{name} is used before it is defined in line {lines[nodes[name]]}",
            hint="put the lines of a graph in the order in which they run",
        )
    near = difflib.get_close_matches(name, defined, n=1)
    hint = f"the nearest name is %{near[0]}" if near else None
    return ProgramError(f"%{name} is not defined", hint=hint)
