"""Lower ATen operators that look up and scatter."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from reroll.errors import ExportError
from reroll.export.onnx.graph import TARGET, Value
from reroll.export.onnx.ops.arguments import shape_of
from reroll.export.onnx.ops.complex_numbers import by_parts
from reroll.rewrite.ir.lowerings import lowering, op_name
from reroll.rewrite.ir.matching import shape

if TYPE_CHECKING:
    from reroll.export.onnx.emit.translate import Translator

INT = torch.int64


@lowering(TARGET, "aten::index.Tensor")
def index(g: Translator, node: fx.Node, x: Any, indices: Sequence[Any]) -> Value:
    """Index with tensors of indices, which are broadcast together, or with masks."""
    axes, places = _by_axis(g, node, indices)
    x_rank, rank = len(shape_of(node)), len(shape(node))
    if len(axes) == 1:
        made = g.op("Gather", g.tensor(x), places[0], axis=axes[0])
    else:
        others = [i for i in range(x_rank) if i not in axes]
        turned = _turned(g, g.tensor(x), [*axes, *others])
        made = g.op("GatherND", turned, _stacked(g, places))
        if axes == list(range(axes[0], axes[0] + len(axes))):
            # the dimensions of adjacent indices stay in place; otherwise they come first
            new = rank - len(others)
            order = [*range(new, new + axes[0]), *range(new), *range(new + axes[0], rank)]
            made = _turned(g, made, order)
    # the number of elements that a mask selects, which every trip computes again
    for axis, dim in enumerate(shape(node)):
        if isinstance(dim, str) and re.fullmatch(r"u\d+", dim):
            g.sizes[dim] = g.op("Shape", made, start=axis, end=axis + 1, dtype=INT)
    return made


def _by_axis(g: Translator, node: fx.Node, indices: Sequence[Any]) -> tuple[list[int], list[Value]]:
    """Return the indexed dimensions, and the indices of each.

    A mask becomes the indices of its true elements.
    """
    sources: Any = node.args[1]
    axes: list[int] = []
    places: list[Value] = []
    axis = 0
    for value, source in zip(indices, sources, strict=True):
        if value is None:
            axis += 1
            continue
        found = g.tensor(value)
        if found.dtype == torch.bool:
            where = g.op("NonZero", found, dtype=INT)
            rank = len(shape(source))
            places += [g.op("Gather", where, g.number(i, INT), axis=0) for i in range(rank)]
        else:
            rank = 1
            places.append(g.cast(found, INT))
        axes += range(axis, axis + rank)
        axis += rank
    return axes, places


def _turned(g: Translator, x: Value, order: Sequence[int]) -> Value:
    order = list(order)
    return x if order == sorted(order) else g.op("Transpose", x, perm=order)


def _stacked(g: Translator, indices: Sequence[Value]) -> Value:
    """Broadcast indices of several dimensions, and stack them for GatherND: [..., dimensions]."""
    if len(indices) > 1:
        size: Value | None = None
        for value in indices:
            # the sum of zeros of all shapes has the broadcast shape
            zero = g.op("Mul", value, g.number(0, INT))
            size = zero if size is None else g.op("Add", size, zero)
        assert size is not None
        indices = [g.op("Add", value, size) for value in indices]
    return g.op("Concat", *(g.op("Unsqueeze", v, g.ints(-1)) for v in indices), axis=-1)


@lowering(TARGET, "aten::index_put.default")
def index_put(
    g: Translator,
    node: fx.Node,
    x: Any,
    indices: Sequence[Any],
    values: Any,
    accumulate: bool = False,
) -> Value:
    """Replace the elements of a tensor at given indices or where masks are true."""
    dtype, rank = g.dtype(node), len(shape(node))
    x = g.tensor(x, dtype)
    is_mask = len(indices) == 1 and g.tensor(indices[0]).dtype == torch.bool
    if is_mask and not accumulate and not shape_of(node, 2):
        sources: Any = node.args[1]
        mask, missing = g.tensor(indices[0]), rank - len(shape(sources[0]))
        if missing:
            mask = g.op("Unsqueeze", mask, g.ints(*range(rank - missing, rank)))
        return g.op("Where", mask, g.tensor(values, dtype), x, dtype=dtype)
    axes, places = _by_axis(g, node, indices)
    order = [*axes, *(i for i in range(rank) if i not in axes)]
    if order != sorted(order):
        raise ExportError(
            "index_put behind a dimension that has no indices has no lowering to ONNX",
            hint="move the dimensions that have indices to the front",
        )
    where = _stacked(g, places)
    size = g.op("Shape", where, start=0, end=-1, dtype=INT)
    if len(axes) < rank:
        rest = g.op("Shape", x, start=len(axes), end=rank, dtype=INT)
        size = g.op("Concat", size, rest, axis=0)
    updates = g.op("Expand", g.tensor(values, dtype), size)
    return g.op("ScatterND", x, where, updates, reduction="add" if accumulate else None)


@lowering(TARGET, "aten::index_select.default")
@by_parts
def index_select(g: Translator, node: fx.Node, x: Any, dim: int, indices: Any) -> Value:
    """Select some indices of a dimension."""
    return g.op("Gather", g.tensor(x), g.tensor(indices), axis=dim)


@lowering(TARGET, "aten::gather.default")
def gather(g: Translator, node: fx.Node, x: Any, dim: int, indices: Any, **_: Any) -> Value:
    """Gather elements by an index for each."""
    x, indices = g.tensor(x), g.tensor(indices, INT)
    rank = len(shape(node))
    # torch reads only as many rows of x as the indices have
    others = [i for i in range(rank) if i != dim % rank]
    if any(shape(node)[i] != shape_of(node)[i] for i in others):
        ends = g.op("Gather", g.op("Shape", indices, dtype=INT), g.ints(*others), axis=0)
        x = g.op("Slice", x, g.ints(*[0] * len(others)), ends, g.ints(*others))
    return g.op("GatherElements", x, indices, axis=dim)


_SCATTER = {
    "aten::scatter.src": None,
    "aten::scatter.value": None,
    "aten::scatter_add.default": "add",
    "aten::scatter.reduce": None,
    "aten::scatter.value_reduce": None,
    "aten::scatter_reduce.two": None,
}
_REDUCTIONS = {
    "sum": "add",
    "add": "add",
    "prod": "mul",
    "multiply": "mul",
    "amax": "max",
    "amin": "min",
}


@lowering(TARGET, *_SCATTER)
def scatter(
    g: Translator,
    node: fx.Node,
    x: Any,
    dim: int,
    indices: Any,
    source: Any,
    reduce: str | None = None,
    *,
    include_self: bool = True,
) -> Value:
    """Replace the elements of a tensor at the index of each."""
    dtype, reduction = g.dtype(node), _SCATTER[op_name(node.target)]
    if reduce is not None:
        reduction = _REDUCTIONS.get(reduce)
        if reduction is None or not include_self:
            raise ExportError(f"scatter with {reduce!r} of new elements has no lowering to ONNX")
    x, indices = g.tensor(x, dtype), g.tensor(indices, INT)
    size = g.op("Shape", indices, dtype=INT)
    if isinstance(node.args[3], fx.Node) and len(shape_of(node, 3)):
        rank = len(shape(node))
        # torch reads only as many elements of the source as there are indices
        updates = g.op("Slice", g.tensor(source, dtype), g.ints(*[0] * rank), size)
    else:
        updates = g.op("Expand", g.tensor(source, dtype), size)
    return g.op("ScatterElements", x, indices, updates, axis=dim, reduction=reduction)


@lowering(TARGET, "aten::index_add.default")
def index_add(
    g: Translator, node: fx.Node, x: Any, dim: int, indices: Any, source: Any, *, alpha: Any = 1
) -> Value:
    """Add slices to a tensor at some indices of a dimension."""
    dtype, rank = g.dtype(node), len(shape(node))
    x, source = g.tensor(x, dtype), g.tensor(source, dtype)
    if alpha != 1:
        source = g.op("Mul", source, g.number(alpha, dtype))
    places = g.tensor(indices, INT)
    if others := [i for i in range(rank) if i != dim % rank]:
        places = g.op("Unsqueeze", places, g.ints(*others))
    places = g.op("Expand", places, g.op("Shape", source, dtype=INT))
    return g.op("ScatterElements", x, places, source, axis=dim, reduction="add")
