"""Shapes of a captured graph: sizes of symbolic dimensions, and reshapes without them."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from reroll.rewrite.ir.hidden import stand_in
from reroll.rewrite.ir.records import Dim
from reroll.rewrite.ir.types import type_of

aten = torch.ops.aten

_RESHAPES = (
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.unsqueeze.default,
)
_OPERATORS: dict[type[ast.AST], Callable[..., int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.USub: operator.neg,
}
_FUNCTIONS: dict[str, Callable[..., int]] = {
    "Max": max,
    "Min": min,
    "FloorDiv": operator.floordiv,
}


def concrete(dim: Dim, sizes: Mapping[str, int]) -> int:
    """Compute the size of a dimension from the sizes of its names; KeyError for an unknown name."""
    if isinstance(dim, int):
        return dim

    def value(tree: ast.AST) -> int:
        if isinstance(tree, ast.Constant) and isinstance(tree.value, int):
            return tree.value
        if isinstance(tree, ast.Name):
            return sizes[tree.id]
        if isinstance(tree, ast.BinOp) and type(tree.op) in _OPERATORS:
            return _OPERATORS[type(tree.op)](value(tree.left), value(tree.right))
        if isinstance(tree, ast.UnaryOp) and type(tree.op) in _OPERATORS:
            return _OPERATORS[type(tree.op)](value(tree.operand))
        if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name):
            return _FUNCTIONS[tree.func.id](*map(value, tree.args))
        raise KeyError(dim)

    try:
        return value(ast.parse(dim, mode="eval").body)
    except SyntaxError:
        raise KeyError(dim) from None


def drop_copies(graph: fx.Graph) -> None:
    """Remove copies to another memory layout, which only keep a flat program bit-identical."""
    for node in graph.nodes:
        if node.target is aten.contiguous.default:
            stand_in(node, node.args[0])
            graph.erase_node(node)


def tidy_shapes(graph: fx.Graph) -> int:
    """Rewrite reshapes and expands without the sizes that they keep; return how many changed.

    `reshape(x, [b, s, 9, 64])` of [b, s, 576] becomes `unflatten(x, 2, [9, 64])`. A layer that
    splits its own dimensions then needs no size from outside the layer.
    """
    changed = 0
    for node in list(graph.nodes):
        if node.target is aten.permute.default:
            changed += _tidy_permute(node)
        if node.target in (aten.reshape.default, aten.unflatten.int):
            changed += _undo_flatten(node)
        if node.target is aten.reshape.default:
            changed += _tidy_reshape(graph, node)
        elif node.target is aten.expand.default:
            changed += _tidy_expand(node)
        elif node.target is aten.transpose.int:
            changed += _cancel_transpose(node)
    graph.eliminate_dead_code()
    return changed


def _shape(node: Any) -> tuple[Dim, ...] | None:
    type_ = type_of(node)
    return None if type_ is None else type_.shape


def _tidy_reshape(graph: fx.Graph, node: fx.Node) -> int:
    inner: Any = node.args[0]
    while inner.target in _RESHAPES and _shape(inner.args[0]) is not None:
        inner = inner.args[0]
        node.args = (inner, *node.args[1:])
    before, after = _shape(inner), _shape(node)
    if before is None or after is None:
        return 0
    if before == after:
        stand_in(node, inner)
        return 1
    head = 0
    while head < min(len(before), len(after)) and before[head] == after[head]:
        head += 1
    tail = 0
    while tail < min(len(before), len(after)) - head and before[-1 - tail] == after[-1 - tail]:
        tail += 1
    if head + tail == min(len(before), len(after)) and tail:
        # a dimension of size 1 was added or removed: include its neighbour
        tail -= 1
    old, new = before[head : len(before) - tail], after[head : len(after) - tail]
    if len(old) == 1 and len(new) > 1 and all(isinstance(size, int) for size in new):
        node.target, node.args = aten.unflatten.int, (node.args[0], head, list(new))
    elif len(new) == 1 and len(old) > 1:
        last = head + len(old) - 1
        node.target, node.args = aten.flatten.using_ints, (node.args[0], head, last)
    else:
        return 0
    return 1


def _tidy_expand(node: fx.Node) -> int:
    inner: Any = node.args[0]
    before, after = _shape(inner), _shape(node)
    if before is None or after is None:
        return 0
    if before == after:
        stand_in(node, inner)
        return 1
    added = len(after) - len(before)
    sizes = [
        -1 if i >= added and before[i - added] == size else size for i, size in enumerate(after)
    ]
    if all(isinstance(size, int) for size in sizes):
        node.args = (inner, sizes)
        return 1
    return 0


def _tidy_permute(node: fx.Node) -> int:
    order: Any = node.args[1]
    moved = [i for i, d in enumerate(order) if i != d % len(order)]
    if len(moved) != 2:
        return 0
    node.target, node.args = aten.transpose.int, (node.args[0], *moved)
    return 1


def _undo_flatten(node: fx.Node) -> int:
    inner: Any = node.args[0]
    if inner.target is not aten.flatten.using_ints:
        return 0
    if _shape(node) is None or _shape(inner.args[0]) != _shape(node):
        return 0
    stand_in(node, inner.args[0])
    return 1


def _cancel_transpose(node: fx.Node) -> int:
    inner: Any = node.args[0]
    rank = len(_shape(node) or ())
    if inner.target is not aten.transpose.int or not rank:
        return 0
    pairs: tuple[Any, Any] = (node.args[1:3], inner.args[1:3])
    dims = [{d % rank for d in pair} for pair in pairs]
    if dims[0] != dims[1]:
        return 0
    stand_in(node, inner.args[0])
    return 1
