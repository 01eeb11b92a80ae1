"""Matching a region of a graph against a pattern, from its last node back to its inputs.

A pattern is an expression of `Op` over `Var` and `Number`; what it binds comes back as a `Match`,
and a failed match as a `Miss` that knows how far it came.

    x = Var("x")
    square = Op("aten.pow.Tensor_Scalar", x, 2)
    pattern = Op("aten.mul.Tensor", x, Op("aten.rsqrt.default", ...), commutes=True)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from reroll.rewrite.ir.patterns import Match, Miss


@dataclass(frozen=True)
class Var:
    """Binds any node; the same name twice must be the same node. `where` may refuse a node."""

    name: str
    where: Callable[[fx.Node], bool] | None = None


@dataclass(frozen=True)
class Number:
    """Binds a number (or list of numbers) that stands in the graph as a constant."""

    name: str


class Op:
    """A call of one of the ops named (separated by `|`) with arguments that match.

    Trailing arguments that the pattern does not name must be absent or None. `commutes`: the first
    two arguments may be exchanged.
    """

    def __init__(self, targets: str, *args: Any, commutes: bool = False) -> None:
        self.targets = frozenset(targets.split("|"))
        self.args = args
        self.commutes = commutes


@dataclass(frozen=True)
class Either:
    """The first of several patterns that matches."""

    choices: tuple[Any, ...]


def either(*choices: Any) -> Either:
    """The first of `choices` that matches."""
    return Either(choices)


def cast(pattern: Any) -> Either:
    """The pattern, or a conversion of it to another dtype."""
    return Either((Op("aten.to.dtype", pattern, ANY), pattern))


ANY = object()  # matches every constant


# what a pattern's variables stand for, and the names of the nodes of its region
_Found = tuple[dict[str, Any], tuple[str, ...]]


def match(pattern: Any, node: fx.Node, name: str = "") -> Match | Miss:
    """Match `pattern` with `node` as its last operation."""
    search = _Search(name)
    for bound, nodes in search.solutions(pattern, node, ({}, ())):
        return Match(name, bound, tuple(dict.fromkeys(nodes)))
    assert search.miss is not None
    return search.miss


class _Search:
    """One attempt: a search that backtracks over `Either` and exchanged arguments.

    Its methods yield every way in which a value is an instance of a pattern, after what was `found`
    before it.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.miss: Miss | None = None

    def solutions(self, pattern: Any, value: Any, found: _Found) -> Iterator[_Found]:
        if pattern is ANY:
            yield found
        elif isinstance(pattern, Either):
            for choice in pattern.choices:
                yield from self.solutions(choice, value, found)
        elif isinstance(pattern, Var):
            yield from self.variable(pattern, value, found)
        elif isinstance(pattern, Number):
            yield from self.number(pattern, value, found)
        elif isinstance(pattern, Op):
            yield from self.calls(pattern, value, found)
        elif isinstance(pattern, (list, tuple)):
            if isinstance(value, (list, tuple)) and len(value) == len(pattern):
                yield from self.sequence(list(pattern), list(value), found)
            else:
                self.fail(f"expected {len(pattern)} values, found {value!r}", found[1])
        elif _is_constant(value, pattern):
            yield found
        else:
            self.fail(f"expected {pattern!r}, found {value!r}", found[1])

    def variable(self, pattern: Var, value: Any, found: _Found) -> Iterator[_Found]:
        bound, nodes = found
        if not isinstance(value, fx.Node):
            return self.fail(f"expected a tensor for {pattern.name}, found {value!r}", nodes)
        if bound.get(pattern.name, value) is not value:
            return self.fail(f"{pattern.name} is two different tensors", nodes, value)
        if pattern.where is not None and not pattern.where(value):
            return self.fail(f"{value.name} cannot be {pattern.name}", nodes, value)
        yield {**bound, pattern.name: value}, nodes

    def number(self, pattern: Number, value: Any, found: _Found) -> Iterator[_Found]:
        bound, nodes = found
        if isinstance(value, fx.Node) or value is None:
            return self.fail(f"{pattern.name} is not a constant", nodes)
        if bound.get(pattern.name, value) != value:
            return self.fail(f"{pattern.name} is two different numbers", nodes)
        yield {**bound, pattern.name: value}, nodes

    def calls(self, pattern: Op, node: Any, found: _Found) -> Iterator[_Found]:
        bound, nodes = found
        wanted = "|".join(sorted(pattern.targets))
        if not isinstance(node, fx.Node):
            return self.fail(f"expected {wanted}, found {node!r}", nodes)
        if str(node.target) not in pattern.targets or node.op != "call_function":
            return self.fail(f"expected {wanted}, found {node.target}", nodes, node)
        args = list(all_arguments(node))
        defaults = _defaults(node)
        while len(args) > len(pattern.args) and _same(args[-1], defaults.get(len(args) - 1)):
            args.pop()
        if len(args) != len(pattern.args):
            return self.fail(f"{node.name} has {len(args)} arguments", nodes, node)
        orders = [args]
        if pattern.commutes:
            orders.append([args[1], args[0], *args[2:]])
        for order in orders:
            yield from self.sequence(list(pattern.args), order, (bound, (*nodes, node.name)))

    def sequence(self, patterns: list[Any], values: list[Any], found: _Found) -> Iterator[_Found]:
        if not patterns:
            yield found
            return
        for inner in self.solutions(patterns[0], values[0], found):
            yield from self.sequence(patterns[1:], values[1:], inner)

    def fail(self, reason: str, nodes: tuple[str, ...], at: fx.Node | None = None) -> None:
        """Remember a failure after a region of `nodes` matched, the last of those that came as far.

        Of equals, the last: what comes first is often the form of an op that is not there at all.
        """
        if self.miss is None or len(nodes) >= self.miss.depth:
            names = (at.name,) if at is not None else nodes[-1:]
            self.miss = Miss(reason, names, self.name, len(nodes))


def _is_constant(value: Any, constant: Any) -> bool:
    if isinstance(value, (fx.Node, bool)):
        return value is constant
    return bool(value == constant)


def _defaults(node: fx.Node) -> dict[int, Any]:
    schema = getattr(node.target, "_schema", None)
    return {i: a.default_value for i, a in enumerate(schema.arguments)} if schema else {}


def _same(value: Any, default: Any) -> bool:
    return value is None or (not isinstance(value, fx.Node) and value == default)


def bind(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of an op by their names in its schema, defaults filled in."""
    bound = {}
    for position, argument in enumerate(op._schema.arguments):
        if position < len(args):
            bound[argument.name] = args[position]
        else:
            bound[argument.name] = kwargs.get(argument.name, argument.default_value)
    return bound


def all_arguments(node: fx.Node) -> tuple[Any, ...]:
    """A node's arguments in the order of the op's schema, keywords and defaults filled in."""
    if not hasattr(node.target, "_schema"):
        return (*node.args, *node.kwargs.values())
    return tuple(bind(node.target, node.args, node.kwargs).values())


def argument(node: fx.Node, name: str) -> Any:
    """A node's argument by its name in the op's schema."""
    return bind(node.target, node.args, node.kwargs)[name]


def is_weight(node: fx.Node) -> bool:
    """Whether a node reads a weight."""
    return node.op == "get_attr"


def shape(node: Any) -> tuple[Any, ...]:
    """The shape in a node's type; empty if it has none, or is no node."""
    kind = node.meta.get("type") if isinstance(node, fx.Node) else None
    return kind.shape if kind is not None else ()


def dtype(node: fx.Node) -> torch.dtype | None:
    """The dtype in a node's type, if it has one."""
    kind = node.meta.get("type")
    return kind.dtype if kind is not None else None
