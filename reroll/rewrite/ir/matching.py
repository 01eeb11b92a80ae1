"""Match a region of a graph against a pattern, from its last node back to its inputs.

A pattern is an expression of `Op` over `Var` and `Number`. The result is a `Match` with the bound
variables, or a `Miss` with the number of nodes that matched before the failure.

    x = Var("x")
    square = Op("aten.pow.Tensor_Scalar", x, 2)
    pattern = Op("aten.mul.Tensor", x, Op("aten.rsqrt.default", ...), commutes=True)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from reroll.rewrite.ir.patterns import Match, Miss


@dataclass(frozen=True)
class Var:
    """Variable for a node; the same name must be the same node. `where` may refuse a node."""

    name: str
    where: Callable[[fx.Node], bool] | None = None


@dataclass(frozen=True)
class Number:
    """Variable for a number, or list of numbers, that is a constant in the graph."""

    name: str


class Op:
    """Pattern for a call of one of the ops named (separated by `|`), with matching arguments.

    Trailing arguments that the pattern does not name must be absent or None. `commutes`: the first
    two arguments may be exchanged.
    """

    def __init__(self, targets: str, *args: Any, commutes: bool = False) -> None:
        self.targets = frozenset(targets.split("|"))
        self.args = args
        self.commutes = commutes


@dataclass(frozen=True)
class Either:
    """Pattern that is the first of several that match."""

    choices: tuple[Any, ...]


def either(*choices: Any) -> Either:
    """Return a pattern for the first of `choices` that matches."""
    return Either(choices)


def cast(pattern: Any) -> Either:
    """Return a pattern for `pattern`, or for a conversion of it to another dtype."""
    return Either((Op("aten.to.dtype", pattern, ANY), pattern))


ANY = object()  # matches every constant


# values of a pattern's variables, and names of the nodes in its region
_Found = tuple[dict[str, Any], tuple[str, ...]]


def match(pattern: Any, node: fx.Node, name: str = "") -> Match | Miss:
    """Match `pattern` with `node` as its last operation."""
    search = _Search(name)
    for bound, nodes in search.solutions(pattern, node, ({}, ())):
        return Match(name, bound, tuple(dict.fromkeys(nodes)))
    assert search.miss is not None
    return search.miss


class _Search:
    """Backtracking search over the choices of `Either` and exchanged arguments.

    Its methods extend the bindings in `found`, and yield every way in which a value is an instance
    of a pattern.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.miss: Miss | None = None

    def solutions(self, pattern: Any, value: Any, partial: _Found) -> Iterator[_Found]:
        if pattern is ANY:
            yield partial
        elif isinstance(pattern, Either):
            for choice in pattern.choices:
                yield from self.solutions(choice, value, partial)
        elif isinstance(pattern, Var):
            yield from self.variable(pattern, value, partial)
        elif isinstance(pattern, Number):
            yield from self.number(pattern, value, partial)
        elif isinstance(pattern, Op):
            yield from self.calls(pattern, value, partial)
        elif isinstance(pattern, (list, tuple)):
            if isinstance(value, (list, tuple)) and len(value) == len(pattern):
                yield from self.sequence(list(pattern), list(value), partial)
            else:
                self.fail(f"expected {len(pattern)} values, found {value!r}", partial[1])
        elif _is_constant(value, pattern):
            yield partial
        else:
            self.fail(f"expected {pattern!r}, found {value!r}", partial[1])

    def variable(self, pattern: Var, value: Any, partial: _Found) -> Iterator[_Found]:
        bound, nodes = partial
        if not isinstance(value, fx.Node):
            return self.fail(f"expected a tensor for {pattern.name}, found {value!r}", nodes)
        if bound.get(pattern.name, value) is not value:
            return self.fail(f"{pattern.name} is two different tensors", nodes, value)
        if pattern.where is not None and not pattern.where(value):
            return self.fail(f"{value.name} cannot be {pattern.name}", nodes, value)
        yield {**bound, pattern.name: value}, nodes

    def number(self, pattern: Number, value: Any, partial: _Found) -> Iterator[_Found]:
        bound, nodes = partial
        if isinstance(value, fx.Node) or value is None:
            return self.fail(f"{pattern.name} is not a constant", nodes)
        if bound.get(pattern.name, value) != value:
            return self.fail(f"{pattern.name} is two different numbers", nodes)
        yield {**bound, pattern.name: value}, nodes

    def calls(self, pattern: Op, node: Any, partial: _Found) -> Iterator[_Found]:
        bound, nodes = partial
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

    def sequence(self, patterns: list[Any], values: list[Any], partial: _Found) -> Iterator[_Found]:
        if not patterns:
            yield partial
            return
        for inner in self.solutions(patterns[0], values[0], partial):
            yield from self.sequence(patterns[1:], values[1:], inner)

    def fail(self, reason: str, nodes: tuple[str, ...], at: fx.Node | None = None) -> None:
        """Record a failure after `nodes` matched, if no earlier failure came further.

        Among equally deep failures the last counts, because the first choice is often an unrelated
        form of the op.
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
    """Return all arguments of an op by their names in its schema, with defaults."""
    bound = {}
    for position, argument in enumerate(op._schema.arguments):
        if position < len(args):
            bound[argument.name] = args[position]
        else:
            bound[argument.name] = kwargs.get(argument.name, argument.default_value)
    return bound


def all_arguments(node: fx.Node) -> tuple[Any, ...]:
    """Return a node's arguments in the order of the op's schema, with defaults."""
    if not hasattr(node.target, "_schema"):
        return (*node.args, *node.kwargs.values())
    return tuple(bind(node.target, node.args, node.kwargs).values())


def argument(node: fx.Node, name: str) -> Any:
    """Return a node's argument by its name in the op's schema."""
    return bind(node.target, node.args, node.kwargs)[name]


def unsupported(node: fx.Node, supported: Collection[str]) -> list[str]:
    """Return which arguments have another value than their default and are not `supported`.

    What computes an op in its own way refuses these. So an argument that the op gains later is
    refused as well, and never ignored.
    """
    defaults = {a.name: a.default_value for a in node.target._schema.arguments}  # type: ignore[union-attr]
    values = bind(node.target, node.args, node.kwargs)
    return [n for n, v in values.items() if n not in supported and not _same(v, defaults[n])]


def is_weight(node: fx.Node) -> bool:
    """Whether a node reads a weight."""
    return node.op == "get_attr"


def shape(node: Any) -> tuple[Any, ...]:
    """Return the shape in a node's type; empty if it has none, or is no node."""
    type_ = node.meta.get("type") if isinstance(node, fx.Node) else None
    return type_.shape if type_ is not None else ()


def dtype(node: fx.Node) -> torch.dtype | None:
    """Return the dtype in a node's type; None if it has none."""
    type_ = node.meta.get("type")
    return type_.dtype if type_ is not None else None
