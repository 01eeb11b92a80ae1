"""Convert weight tables to JSON: a list of nodes that refer to earlier nodes by number.

Shared subtrees are written once. Reading checks everything, because the file may be untrusted:
every error is a ProgramError with its position.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from reroll.errors import ProgramError, located
from reroll.rewrite.ir.weights.checked_json import member, typed
from reroll.rewrite.ir.weights.expressions import (
    DTYPE_NAMES,
    Apply,
    Argument,
    Expr,
    Meta,
    Source,
    build,
    dtype_from_name,
    walk,
)
from reroll.rewrite.ir.weights.stacked import Weight, WeightTable


def expr_to_json(expr: Expr) -> dict[str, Any]:
    """Convert an expression to a JSON value."""
    return {"nodes": _nodes_to_json([expr])[0]}


def expr_from_json(data: object) -> Expr:
    """Read an expression from a JSON value; ProgramError if the value is not valid."""
    nodes = _nodes_from_json(member(data, "nodes", list))
    if not nodes:
        raise ProgramError("an expression needs at least one node", where="nodes")
    return nodes[-1]


def table_to_json(table: WeightTable) -> dict[str, Any]:
    """Convert a weight table to a JSON value."""
    nodes, number = _nodes_to_json(e for weight in table.values() for e in weight.entries)
    weights = [
        {
            "name": name,
            "entries": [number[entry] for entry in weight.entries],
            "index": None if weight.index is None else list(weight.index),
            "trainable": weight.trainable,
        }
        for name, weight in table.items()
    ]
    return {"nodes": nodes, "weights": weights}


def table_from_json(data: object) -> WeightTable:
    """Read a weight table from a JSON value; ProgramError if the value is not valid."""
    nodes = _nodes_from_json(member(data, "nodes", list))
    weights: dict[str, Weight] = {}
    for i, item in enumerate(member(data, "weights", list)):
        with located(f"weights[{i}]"):
            name = member(item, "name", str)
            if name in weights:
                raise ProgramError(f"there are two weights called {name!r}")
            entries = tuple(_node(nodes, ref) for ref in member(item, "entries", list))
            trips = None
            if member(item, "index", object) is not None:
                trips = tuple(typed(v, int) for v in member(item, "index", list))
            weights[name] = Weight(entries, trips, member(item, "trainable", bool))
    table = WeightTable(weights)
    table.stored()
    return table


# ---- nodes


def _nodes_to_json(roots: Iterable[Expr]) -> tuple[list[dict[str, Any]], dict[Expr, int]]:
    number: dict[Expr, int] = {}
    nodes: list[dict[str, Any]] = []
    for expr in walk(roots):
        number[expr] = len(nodes)
        if isinstance(expr, Apply):
            args = [_argument_to_json(a, number) for a in expr.args]
            nodes.append({"op": expr.op, "args": args})
        else:
            assert isinstance(expr, Source)
            dtype = DTYPE_NAMES[expr.meta.dtype]
            shape = list(expr.meta.shape)
            nodes.append({"source": expr.name, "dtype": dtype, "shape": shape})
    return nodes, number


def _argument_to_json(argument: Argument, number: dict[Expr, int]) -> Any:
    if isinstance(argument, Expr):
        return {"node": number[argument]}
    return list(argument) if isinstance(argument, tuple) else argument


def _nodes_from_json(data: list[Any]) -> list[Expr]:
    nodes: list[Expr] = []
    for i, item in enumerate(data):
        with located(f"nodes[{i}]"):
            if isinstance(item, dict) and "source" in item:
                shape = tuple(typed(v, int) for v in member(item, "shape", list))
                dtype = dtype_from_name(member(item, "dtype", str))
                nodes.append(Source(member(item, "source", str), Meta(shape, dtype)))
            else:
                args = [_argument(nodes, value) for value in member(item, "args", list)]
                nodes.append(build(member(item, "op", str), *args))
    return nodes


def _argument(nodes: Sequence[Expr], value: object) -> Argument:
    if isinstance(value, dict):
        return _node(nodes, member(value, "node", int))
    if isinstance(value, list):
        return tuple(typed(v, int) for v in value)
    if isinstance(value, bool | int | float | str):
        return value
    raise ProgramError(f"{value!r:.80} is not an argument")


def _node(nodes: Sequence[Expr], ref: object) -> Expr:
    number = typed(ref, int)
    if not 0 <= number < len(nodes):
        raise ProgramError(
            f"node {number} is not one of the {len(nodes)} before it",
            hint="a node may only refer to earlier nodes, so that there is no cycle",
        )
    return nodes[number]
