"""Residual streams: the values that layers add to, with the nodes that write and read them.

A stream is traced from one value through additions, moves of whole channels, and the carries of
loops. It stops at the nodes that write to it and at those that read it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from reroll.rewrite.ir.dtypes import CONVERSIONS
from reroll.rewrite.ir.matching import argument, shape
from reroll.rewrite.ir.patterns import Miss
from reroll.rewrite.ir.program import Loop, Program

aten = torch.ops.aten

# ops that keep every token's channels unchanged, up to a constant factor
_ADD = aten.add.Tensor
_SCALINGS = (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar)
_CASTS = (*CONVERSIONS, aten._to_copy.default)
_MOVES = (
    aten.slice.Tensor,
    aten.select.int,
    aten.unsqueeze.default,
    aten.expand.default,
    aten.squeeze.dim,
    # with a last dimension of the same size, these leave every token's channels together
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.reshape.default,
    aten.view.default,
)


@dataclass
class Stream:
    """Residual stream: its values, and the nodes that write and read it.

    Attributes:
        nodes: its values, in the main graph and in the bodies of loops.
        writers: its nodes that are not computed from the stream itself.
        readers: the nodes outside it that use its values; nodes that read only sizes do not
            count.
    """

    nodes: dict[fx.Node, None] = field(default_factory=dict)
    writers: list[fx.Node] = field(default_factory=list)
    readers: dict[fx.Node, None] = field(default_factory=dict)


class Tracer:
    """Tracer of a Program's residual streams."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.loops = {loop.node: loop for loop in program.loops}
        self.bodies = {loop.body.graph: loop for loop in program.loops}

    def trace(self, start: fx.Node) -> Stream | Miss:
        """Trace the stream that contains `start`; return a `Miss` if there is none."""
        stream = Stream()
        stack = [start]
        while stack:
            node = stack.pop()
            if node in stream.nodes:
                continue
            stream.nodes[node] = None
            before = self.operands(node)
            if isinstance(before, Miss):
                return Miss(before.reason, before.nodes, depth=len(stream.nodes))
            if before is None:
                stream.writers.append(node)
            stack += before or ()
            for user in node.users:
                reached = self.reached(node, user)
                if isinstance(reached, Miss):
                    return Miss(reached.reason, reached.nodes, depth=len(stream.nodes))
                if reached is None:
                    stream.readers[user] = None
                stack += reached or ()
        return stream

    def in_loop(self, node: fx.Node) -> Loop | None:
        """Return the loop whose body contains a node; None outside of loops."""
        return self.bodies.get(node.graph)

    def operands(self, node: fx.Node) -> list[fx.Node] | Miss | None:
        """Return the values of the stream that a node is computed from; None for a writer."""
        if node.op == "placeholder" and node.graph in self.bodies:
            loop = self.bodies[node.graph]
            position = loop.places.index(node)
            return self.ring(loop, position) if position < len(loop.carry) else None
        if node.target is operator.getitem and node.args[0] in self.loops:
            return self.ring(self.loops[node.args[0]], int(node.args[1]))  # type: ignore[index, arg-type]
        if node.op != "call_function":
            return None
        if node.target is _ADD:
            if not all(isinstance(a, fx.Node) for a in node.args[:2]) or node.kwargs:
                return Miss(f"{node.name} adds a constant to the residual stream", (node.name,))
            operands = [a for a in node.args[:2] if isinstance(a, fx.Node)]
            narrow = [a.name for a in operands if channels(a) != channels(node)]
            if narrow:
                return Miss(f"{node.name} adds one number to all channels", tuple(narrow))
            return operands
        if node.target is aten.cat.default:
            dim = int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[arg-type]
            inside = dim not in (-1, rank(node) - 1)
            return _nodes(node.args[0]) if inside else None
        return [node.args[0]] if _passes(node) else None  # type: ignore[list-item]

    def reached(self, node: fx.Node, user: fx.Node) -> list[fx.Node] | Miss | None:
        """Return the values of the stream that a user of `node` produces; None for a reader."""
        if user.target is aten.sym_size.int:
            return []
        if user in self.loops:
            loop = self.loops[user]
            if node in _flat(loop.inputs):
                return Miss("the residual stream is an input of every trip", (user.name, node.name))
            return [n for i, c in enumerate(loop.carry) if c is node for n in self.ring(loop, i)]
        if user.op == "output":
            loop_of = self.in_loop(user)
            if loop_of is None:
                return Miss("the residual stream itself is an output of the model", (node.name,))
            returned = _returned(user.graph)
            return [n for i, r in enumerate(returned) if r is node for n in self.ring(loop_of, i)]
        operands = self.operands(user)
        if isinstance(operands, Miss):
            return operands
        return [user] if operands is not None and node in operands else None

    def ring(self, loop: Loop, position: int) -> list[fx.Node]:
        """Return the nodes of one carried value: before, inside and after the loop."""
        placeholders = loop.places
        after = [
            user
            for user in loop.node.users
            if user.target is operator.getitem and user.args[1] == position
        ]
        return [
            loop.carry[position],
            placeholders[position],
            _returned(loop.body.graph)[position],
            *after,
        ]


def channels(node: fx.Node) -> Any:
    """Return the size of a value's last dimension; None if it has no type."""
    dims = shape(node)
    return dims[-1] if dims else None


def rank(node: fx.Node) -> int:
    """Return the number of dimensions of a value; 0 if it has no type."""
    return len(shape(node))


def _passes(node: fx.Node) -> bool:
    """Whether a node keeps the channels of its first argument together, up to a constant factor."""
    x = node.args[0] if node.args else None
    if not isinstance(x, fx.Node) or channels(x) != channels(node):
        return False
    if node.target in _SCALINGS:
        return not isinstance(node.args[1], fx.Node)
    if node.target in (aten.slice.Tensor, aten.select.int):
        return argument(node, "dim") not in (-1, rank(x) - 1)
    return node.target in _CASTS or node.target in _MOVES


def _returned(graph: fx.Graph) -> tuple[fx.Node, ...]:
    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    return tuple(_nodes(output.args[0]))


def _nodes(value: Any) -> list[fx.Node]:
    return [n for n in _flat(value) if isinstance(n, fx.Node)]


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple | list):
        for item in value:
            yield from _flat(item)
    else:
        yield value
