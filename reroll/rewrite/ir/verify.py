"""Verify that a Program is well formed, which all its readers rely on.

It is checked after parsing, after reading JSON and after every pass. The checks of single nodes are
in `verify_nodes`.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from reroll.errors import CheckpointError, ProgramError
from reroll.rewrite.ir import ops
from reroll.rewrite.ir.program import Loop, Program
from reroll.rewrite.ir.records import TensorType
from reroll.rewrite.ir.text.literals import type_to_text
from reroll.rewrite.ir.types import type_of
from reroll.rewrite.ir.verify_nodes import fitting, node_problem
from reroll.rewrite.ir.weights import Source
from reroll.rewrite.ir.weights.expressions import walk

MAIN = "main"
MAX_TRIPS = 2**16


@dataclass(frozen=True)
class Problem:
    """Error in a Program: message, graph, and the node at fault, if it is one."""

    message: str
    graph: str = MAIN
    node: fx.Node | None = None
    hint: str | None = None

    @property
    def where(self) -> str:
        """Graph and node as text."""
        return self.graph if self.node is None else f"{self.graph}: %{self.node.name}"


def verify(program: Program) -> None:
    """Raise ProgramError, naming graph and node, if the Program is not well formed."""
    for problem in problems(program):
        raise ProgramError(problem.message, problem.where, problem.hint)


def problems(program: Program) -> Iterator[Problem]:
    """Yield the errors of a Program; all but the first may follow from the first."""
    for graph_name, graph in program.graphs():
        yield from _graph_problems(graph_name, graph)
    yield from _interface_problems(program)
    yield from _default_problems(program)
    trips: dict[str, set[int]] = {MAIN: set()}
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target is ops.loop:
            reason = _loop_arguments(program, node)
            if reason is not None:
                yield Problem(reason, MAIN, node)
                return
            loop = Loop(node, program.bodies[str(node.args[0])])
            trips.setdefault(loop.name, set()).add(loop.trips)
            yield from _loop_problems(loop)
    for name, body in program.bodies.items():
        if name == MAIN:
            yield Problem(f"a body cannot be called {MAIN!r}", name)
        if name not in trips:
            yield Problem(f"no loop runs the body {name!r}", name, hint="remove it")
        if type(body.period) is not int or body.period < 1:
            yield Problem(f"the period of a body is 1 or more, not {body.period!r}", name)
    for graph_name, graph in program.graphs():
        yield from _weight_problems(program, graph_name, graph, trips.get(graph_name, set()))


def check_sources(program: Program) -> None:
    """Raise ProgramError if the source lacks a tensor of a weight, or has it in another shape."""
    for name, weight in program.weights.items():
        for expr in walk(weight.entries):
            if not isinstance(expr, Source):
                continue
            try:
                meta = program.source.meta(expr.name)
            except CheckpointError as error:
                raise ProgramError(error.message, f"@{name}", error.hint) from None
            if meta.shape != expr.meta.shape:
                raise ProgramError(
                    f"the tensor {expr.name!r} is {meta} in the checkpoint, not {expr.meta}",
                    where=f"@{name}",
                )


# ---- graphs


def _graph_problems(name: str, graph: fx.Graph) -> Iterator[Problem]:
    defined: set[fx.Node] = set()
    names: set[str] = set()
    body = False
    ended: fx.Node | None = None
    for node in graph.nodes:
        if ended is not None:
            yield Problem("a graph returns once, at its end", name, node)
        if node.op == "placeholder" and body:
            yield Problem("the inputs of a graph come before everything else", name, node)
        body |= node.op != "placeholder"
        if node.name in names:
            yield Problem("two nodes have this name", name, node)
        for argument in node.all_input_nodes:
            if argument not in defined:
                there = "later in" if argument.graph is graph else "not in"
                yield Problem(f"it uses %{argument.name}, which is {there} this graph", name, node)
        reason = node_problem(node, in_body=name != MAIN)
        if reason is not None:
            yield Problem(reason, name, node)
        defined.add(node)
        names.add(node.name)
        ended = node if node.op == "output" else ended
    if ended is None:
        yield Problem("the graph returns nothing", name)


def _interface_problems(program: Program) -> Iterator[Problem]:
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    if len(placeholders) != len(program.inputs):
        yield Problem(f"it takes {len(placeholders)} inputs; {len(program.inputs)} are declared")
    for node, item in zip(placeholders, program.inputs, strict=False):
        if node.target != item.name:
            yield Problem(
                f"it stands for {node.target!r}, and the input is {item.name!r}", node=node
            )
        if node.meta.get("type", item.type) != item.type:
            yield Problem(f"the input is declared {type_to_text(item.type)}", node=node)
    returned = len(_returned(program.graph))
    if returned != len(program.outputs):
        yield Problem(f"it returns {returned} values; {len(program.outputs)} outputs are declared")
    for role, names in (("inputs", [i.name for i in program.inputs]), ("outputs", program.outputs)):
        for name, count in Counter(names).items():
            if count > 1:
                yield Problem(f"two {role} are called {name!r}")


def _default_problems(program: Program) -> Iterator[Problem]:
    """Yield the errors in the graphs of inputs' defaults."""
    before: dict[str, TensorType] = {}
    for item in program.inputs:
        name = f"default {item.name}"
        for node in item.default.nodes if item.default is not None else ():
            if node.op == "get_attr":
                yield Problem("the default of an input reads no weights", name, node)
            if node.op != "placeholder":
                continue
            if node.target not in before:
                message = f"it reads {node.target!r}, which is no input before {item.name!r}"
                yield Problem(message, name, node)
            elif not fitting(node, before[str(node.target)]):
                yield Problem(f"the input {node.target!r} has another type", name, node)
        if item.default is not None:
            yield from _graph_problems(name, item.default)
            if len(_returned(item.default)) != 1:
                yield Problem("the default of an input is one value", name)
        before[item.name] = item.type


def _returned(graph: fx.Graph) -> tuple[object, ...]:
    values = [n.args[0] for n in graph.nodes if n.op == "output" and n.args]
    return values[0] if values and isinstance(values[0], tuple) else ()


# ---- loops


def _loop_arguments(program: Program, node: fx.Node) -> str | None:
    kinds = tuple(map(type, node.args))
    if kinds != (str, tuple, tuple, int) or node.kwargs:
        return "a loop takes the name of a body, a tuple of carry, a tuple of inputs, and trips"
    if node.args[0] not in program.bodies:
        known = ", ".join(map(repr, program.bodies)) or "there are none"
        return f"there is no body {node.args[0]!r} (bodies: {known})"
    return None


def _loop_problems(loop: Loop) -> Iterator[Problem]:
    placeholders = [n for n in loop.body.graph.nodes if n.op == "placeholder"]
    returned = _returned(loop.body.graph)
    if not 1 <= loop.trips <= MAX_TRIPS:
        message = f"a loop makes from 1 to {MAX_TRIPS:,} trips, not {loop.trips}"
        yield Problem(message, node=loop.node)
    if len(returned) != len(loop.carry):
        yield Problem(
            f"the body returns {len(returned)} values, and the loop carries {len(loop.carry)}",
            node=loop.node,
        )
    count = len(loop.carry) + len(loop.inputs)
    if count != len(placeholders):
        yield Problem(
            f"the body {loop.name!r} takes {len(placeholders)} values; the loop gives "
            f"{len(loop.carry)} carried and {len(loop.inputs)} other",
            node=loop.node,
        )
    for i, value in enumerate(loop.inputs):
        if isinstance(value, tuple) and len(value) != loop.trips:
            yield Problem(
                f"input {i} has {len(value)} values for {loop.trips} trips",
                node=loop.node,
                hint="a tuple has one value for each trip",
            )
    for placeholder, value in [*zip(placeholders, (*loop.carry, *loop.inputs), strict=False)]:
        for item in value if isinstance(value, tuple) else (value,):
            if not fitting(item, type_of(placeholder)):
                yield Problem(f"%{placeholder.name} of the body has another type", node=loop.node)
    for placeholder, value in zip(placeholders, returned, strict=False):
        if not fitting(value, type_of(placeholder)):
            message = f"the next trip's %{placeholder.name} has another type than this trip's"
            yield Problem(message, loop.name, loop.body.graph.output_node())
    for user in loop.node.users:
        if user.target is not operator.getitem or user.args[0] is not loop.node:
            yield Problem("the results of a loop are taken one by one, with getitem", node=user)
        elif not isinstance(user.args[1], int) or not 0 <= user.args[1] < len(loop.carry):
            message = f"it takes result {user.args[1]} of a loop that carries {len(loop.carry)}"
            yield Problem(message, node=user)


# ---- weights


def _weight_problems(
    program: Program, name: str, graph: fx.Graph, trips: set[int]
) -> Iterator[Problem]:
    for node in graph.nodes:
        if node.op != "get_attr":
            continue
        weight = program.weights.get(str(node.target))
        if weight is None:
            yield Problem(f"there is no weight @{node.target}", name, node)
            continue
        if weight.trips is not None and trips != {weight.trips}:
            wanted = " and ".join(f"for {n} trips" for n in sorted(trips)) or "outside loops"
            message = f"@{node.target} is stacked for {weight.trips} trips, and used {wanted}"
            yield Problem(message, name, node)
        type_ = type_of(node)
        meta = TensorType(weight.meta.dtype, weight.meta.shape)
        if type_ is not None and type_ != meta:
            yield Problem(f"@{node.target} is {weight.meta}, not {type_to_text(type_)}", name, node)
