"""Lower ATen operators that rearrange elements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from reroll.errors import ExportError
from reroll.export.onnx.graph import TARGET, Value
from reroll.export.onnx.ops import heads
from reroll.export.onnx.ops.arguments import Parameter, repeated, shape_of
from reroll.export.onnx.ops.complex_numbers import by_parts
from reroll.export.onnx.plan.reading import CONCATENATIONS, EXCHANGES, exchanged
from reroll.rewrite.ir.lowerings import lowering, op_name
from reroll.rewrite.ir.matching import shape

if TYPE_CHECKING:
    from reroll.export.onnx.emit.translate import Translator

INT = torch.int64
# larger than any size
END = 2**62


@lowering(TARGET, "aten::unsqueeze.default")
@by_parts
def unsqueeze(g: Translator, node: fx.Node, x: Any, dim: int) -> Value:
    """Insert a dimension of size one."""
    x, rank = g.tensor(x), len(shape(node))
    return repeated(g.op("Unsqueeze", x, g.ints(dim % rank)), x.repeated and dim % rank < rank - 1)


@lowering(TARGET, "aten::squeeze.dim")
@by_parts
def squeeze(g: Translator, node: fx.Node, x: Any, dim: int) -> Value:
    """Remove a dimension of size one."""
    if len(shape_of(node)) == len(shape(node)):
        return g.tensor(x)
    return g.op("Squeeze", g.tensor(x), g.ints(dim))


@lowering(TARGET, "aten::squeeze.default", "aten::squeeze.dims")
@by_parts
def squeeze_all(g: Translator, node: fx.Node, x: Any, dims: Sequence[int] = ()) -> Value:
    """Remove the given dimensions of size one, or all of them."""
    return g.reshape(g.tensor(x), shape_of(node), shape(node))


@lowering(
    TARGET,
    "aten::reshape.default",
    "aten::view.default",
    "aten::view_as.default",
    "aten::reshape_as.default",
    "aten::_unsafe_view.default",
    "aten::flatten.using_ints",
    "aten::unflatten.int",
)
@by_parts
def reshape(g: Translator, node: fx.Node, x: Any, *_: Any) -> Value:
    """Lower every op that only reshapes, from the shapes before and after."""
    return heads.reshape(g, g.tensor(x), shape_of(node), shape(node))


@lowering(TARGET, *EXCHANGES)
@by_parts
def transpose(g: Translator, node: fx.Node, x: Any, *_: int) -> Any:
    """Exchange two dimensions; for the matrices of a weight, in the file."""
    if isinstance(x, Parameter) and x.read.how == "turned":
        return x.ref.turned()
    order = list(range(len(shape(node))))
    a, b = exchanged(node)
    order[a], order[b] = order[b], order[a]
    return heads.transpose(g, g.tensor(x), order)


@lowering(TARGET, "aten::permute.default")
@by_parts
def permute(g: Translator, node: fx.Node, x: Any, dims: Sequence[int]) -> Value:
    """Permute dimensions."""
    return heads.transpose(g, g.tensor(x), [d % len(dims) for d in dims])


@lowering(TARGET, "aten::movedim", "aten::moveaxis")
@by_parts
def movedim(g: Translator, node: fx.Node, x: Any, before: Any, after: Any) -> Value:
    """Move dimensions to other positions; the others keep their order."""
    rank = len(shape(node))
    old, new = ([d % rank for d in ([v] if isinstance(v, int) else v)] for v in (before, after))
    others = iter(d for d in range(rank) if d not in old)
    order = [old[new.index(i)] if i in new else next(others) for i in range(rank)]
    return heads.transpose(g, g.tensor(x), order)


@lowering(TARGET, "aten::expand.default")
@by_parts
def expand(g: Translator, node: fx.Node, x: Any, sizes: Sequence[Any], **_: Any) -> Value:
    """Repeat dimensions of size one, to the result's shape."""
    dims: Sequence[Any] = shape(node)
    if any(isinstance(s, int) and s == -1 for s in sizes):
        dims = [
            1 if isinstance(s, int) and s == -1 else d for s, d in zip(sizes, dims, strict=True)
        ]
    return g.op("Expand", g.tensor(x), g.shape(dims))


@lowering(TARGET, "aten::expand_as.default", "aten::broadcast_to.default")
@by_parts
def expand_as(g: Translator, node: fx.Node, x: Any, _: Any) -> Value:
    """Repeat dimensions of size one."""
    return g.op("Expand", g.tensor(x), g.shape(shape(node)))


@lowering(TARGET, "aten::broadcast_tensors.default")
def broadcast_tensors(g: Translator, node: fx.Node, parts: Sequence[Any]) -> tuple[Value, ...]:
    """Expand all tensors to their common shape."""
    values = [g.tensor(part) for part in parts]
    whole: Value | None = None
    for value in values:
        ones = g.op("Expand", g.number(1, INT), g.op("Shape", value, dtype=INT))
        whole = ones if whole is None else g.op("Mul", whole, ones)
    assert whole is not None
    size = g.op("Shape", whole, dtype=INT)
    return tuple(g.op("Expand", value, size) for value in values)


@lowering(TARGET, "aten::meshgrid.default", "aten::meshgrid.indexing")
def meshgrid(
    g: Translator, node: fx.Node, parts: Sequence[Any], *, indexing: str = "ij"
) -> tuple[Value, ...]:
    """Return the coordinates of a grid, one tensor for each dimension."""
    order = list(range(len(parts)))
    if indexing == "xy" and len(order) > 1:
        order[0], order[1] = 1, 0
    lifted = []
    for part, axis in zip(parts, order, strict=True):
        others = [i for i in range(len(parts)) if i != axis]
        vector = g.op("Reshape", g.tensor(part), g.ints(-1))
        lifted.append(g.op("Unsqueeze", vector, g.ints(*others)) if others else vector)
    return broadcast_tensors(g, node, lifted)


@lowering(TARGET, "aten::repeat.default", "aten::tile.default")
@by_parts
def repeat(g: Translator, node: fx.Node, x: Any, counts: Sequence[Any]) -> Value:
    """Repeat the whole tensor a number of times along each dimension."""
    x, rank, counts = g.tensor(x), len(shape(node)), list(counts)
    missing = rank - len(shape_of(node))
    if missing:
        x = g.op("Unsqueeze", x, g.ints(*range(missing)))
    return g.op("Tile", x, g.shape([1] * (rank - len(counts)) + counts))


@lowering(TARGET, "aten::repeat_interleave.self_int")
@by_parts
def repeat_interleave(
    g: Translator, node: fx.Node, x: Any, count: Any, dim: int | None = None, **_: Any
) -> Value:
    """Repeat each element a number of times, next to each other."""
    x, rank = g.tensor(x), len(shape(node))
    if dim is None:
        x, dim = g.op("Reshape", x, g.ints(-1)), 0
    axis = dim % rank + 1
    x = g.op("Unsqueeze", x, g.ints(axis))
    times = [1] * axis + [count] + [1] * (rank - axis)
    return g.op("Reshape", g.op("Expand", x, g.shape(times)), g.shape(shape(node)))


@lowering(TARGET, "aten::unbind.int")
@by_parts
def unbind(g: Translator, node: fx.Node, x: Any, dim: int = 0) -> tuple[Value, ...]:
    """Return the slices along a dimension, without that dimension."""
    x, count = g.tensor(x), shape_of(node)[dim]
    return tuple(g.op("Gather", x, g.number(i, INT), axis=dim) for i in range(count))


@lowering(TARGET, "aten::flip.default")
@by_parts
def flip(g: Translator, node: fx.Node, x: Any, dims: Sequence[int]) -> Value:
    """Reverse dimensions."""
    count = len(dims)
    ends = g.ints(*[-1] * count), g.ints(*[-END] * count)
    return g.op("Slice", g.tensor(x), *ends, g.ints(*dims), g.ints(*[-1] * count))


@lowering(TARGET, "aten::roll.default")
@by_parts
def roll(g: Translator, node: fx.Node, x: Any, shifts: Any, dims: Sequence[int] = ()) -> Value:
    """Rotate dimensions: elements that leave one end enter at the other."""
    x = g.tensor(x)
    flat = x if dims else g.op("Reshape", x, g.ints(-1))
    for shift, dim in zip(shifts, dims or [0], strict=True):
        at = g.op("Neg", g.shape([shift]))
        parts = [
            g.op("Slice", flat, start, end, g.ints(dim))
            for start, end in ((at, g.ints(END)), (g.ints(0), at))
        ]
        flat = g.op("Concat", *parts, axis=dim)
    return flat if dims else g.op("Reshape", flat, g.shape(shape(node)))


@lowering(TARGET, "aten::tril.default", "aten::triu.default")
def triangle(g: Translator, node: fx.Node, x: Any, diagonal: Any = 0) -> Value:
    """Keep the elements below, or above, a diagonal; the others become zero."""
    dtype, upper = g.dtype(node), int("triu" in op_name(node.target))
    x = g.tensor(x)
    x = g.cast(x, INT) if dtype == torch.bool else x
    return g.cast(g.op("Trilu", x, g.tensor(diagonal, INT), upper=upper), dtype)


@lowering(TARGET, "aten::unfold.default")
def unfold(g: Translator, node: fx.Node, x: Any, dim: int, size: int, step: int) -> Value:
    """Return windows of a dimension, as a new last dimension."""
    x, rank = g.tensor(x), len(shape(node)) - 1
    count = g.shape([shape(node)[dim % rank]])
    zero, one = g.number(0, INT), g.number(1, INT)
    starts = g.op("Range", zero, g.op("Squeeze", count, g.ints(0)), one)
    starts = g.op("Mul", g.op("Unsqueeze", starts, g.ints(1)), g.number(step, INT))
    index = g.op("Add", starts, g.number([list(range(size))], INT))
    made = g.op("Gather", x, index, axis=dim % rank)
    order = [i for i in range(rank + 1) if i != dim % rank + 1] + [dim % rank + 1]
    return g.op("Transpose", made, perm=order)


@lowering(TARGET, "aten::constant_pad_nd.default")
def constant_pad(
    g: Translator, node: fx.Node, x: Any, sizes: Sequence[int], fill: Any = 0
) -> Value:
    """Pad with one number; `sizes` are before and after, for the last dimension first."""
    x = g.tensor(x)
    others = [0] * (len(shape(node)) - len(sizes) // 2)
    before, after = [*others, *sizes[::2][::-1]], [*others, *sizes[1::2][::-1]]
    return g.op("Pad", x, g.ints(*before, *after), g.number(fill or 0, x.dtype))


@lowering(TARGET, "aten::pad.default")
def pad(
    g: Translator,
    node: fx.Node,
    x: Any,
    sizes: Sequence[int],
    mode: str = "constant",
    value: Any = None,
) -> Value:
    """Pad with one number."""
    if mode != "constant":
        raise ExportError(f"padding in the mode {mode!r} has no lowering to ONNX")
    return constant_pad(g, node, x, sizes, value)


@lowering(TARGET, *CONCATENATIONS)
def cat(g: Translator, node: fx.Node, parts: Sequence[Any], dim: int = 0) -> Value:
    """Concatenate tensors."""
    rank, dtype = len(shape(node)), g.dtype(node)
    sources: Any = node.args[0]
    # torch accepts an empty vector among tensors of any rank
    values = [
        g.tensor(v, dtype, rank)
        for v, source in zip(parts, sources, strict=True)
        if rank == 1 or _shape_of(v, source) != (0,)
    ]
    twice = len(values) == 2 and values[0].name == values[1].name and dim % rank == rank - 1
    return repeated(g.op("Concat", *values, axis=dim), twice)


def _shape_of(value: Any, source: fx.Node) -> tuple[Any, ...]:
    return value.shape if isinstance(value, Parameter) else shape(source)


@lowering(TARGET, "aten::stack.default")
def stack(g: Translator, node: fx.Node, parts: Sequence[Any], dim: int = 0) -> Value:
    """Stack tensors along a new dimension."""
    axis = dim % len(shape(node))
    lifted = [g.op("Unsqueeze", g.tensor(v, g.dtype(node)), g.ints(axis)) for v in parts]
    return g.op("Concat", *lifted, axis=axis)


@lowering(TARGET, "aten::slice.Tensor")
@by_parts
def slice_(
    g: Translator,
    node: fx.Node,
    x: Any,
    dim: int = 0,
    start: Any = None,
    end: Any = None,
    step: int = 1,
) -> Value:
    """Take every `step`-th element from `start` to before `end`."""
    x = g.tensor(x)
    last = END if end is None else end
    bounds = [g.shape([v]) for v in (start or 0, last)]
    return g.op("Slice", x, *bounds, g.ints(dim), g.ints(step))


@lowering(TARGET, "aten::narrow.default")
@by_parts
def narrow(g: Translator, node: fx.Node, x: Any, dim: int, start: Any, length: Any) -> Value:
    """Take `length` elements of a dimension."""
    first, count = g.shape([start]), g.shape([length])
    return g.op("Slice", g.tensor(x), first, g.op("Add", first, count), g.ints(dim))


@lowering(TARGET, "aten::slice_scatter.default")
def slice_scatter(
    g: Translator,
    node: fx.Node,
    x: Any,
    source: Any,
    dim: int = 0,
    start: Any = None,
    end: Any = None,
    step: int = 1,
) -> Value:
    """Replace a slice of a tensor."""
    dtype, rank = g.dtype(node), len(shape(node))
    x, source, axis = g.tensor(x, dtype), g.tensor(source, dtype), dim % rank
    first, last = g.shape([start or 0]), g.shape([END if end is None else end])
    if step == 1:
        before = g.op("Slice", x, g.ints(0), first, g.ints(axis))
        after = g.op("Slice", x, last, g.ints(END), g.ints(axis))
        return g.op("Concat", before, source, after, axis=axis)
    size = g.op("Shape", x, start=axis, end=axis + 1, dtype=INT)
    places = g.op("Range", g.number(0, INT), g.op("Squeeze", size, g.ints(0)), g.number(1, INT))
    places = g.op("Slice", places, first, last, g.ints(0), g.ints(step))
    if rank > 1:
        places = g.op("Unsqueeze", places, g.ints(*(i for i in range(rank) if i != axis)))
    places = g.op("Expand", places, g.op("Shape", source, dtype=INT))
    return g.op("ScatterElements", x, places, source, axis=axis)


@lowering(TARGET, "aten::select_scatter.default")
def select_scatter(
    g: Translator, node: fx.Node, x: Any, source: Any, dim: int, index: int
) -> Value:
    """Replace one index of a dimension."""
    source = g.op("Unsqueeze", g.tensor(source, g.dtype(node)), g.ints(dim % len(shape(node))))
    return slice_scatter(g, node, x, source, dim, index, None if index == -1 else index + 1)


@lowering(TARGET, "aten::copy.default")
def copy(g: Translator, node: fx.Node, x: Any, source: Any, *_: Any) -> Value:
    """Expand a source that replaces a whole tensor."""
    return g.op("Expand", g.tensor(source, g.dtype(node)), g.shape(shape(node)))


@lowering(TARGET, "aten::select.int")
@by_parts
def select(g: Translator, node: fx.Node, x: Any, dim: int, index: Any) -> Value:
    """Take one index of a dimension, without that dimension."""
    place = g.number(index, INT) if isinstance(index, int) else g.tensor(index)
    return g.op("Gather", g.tensor(x), place, axis=dim)


@lowering(TARGET, "aten::chunk.default", "aten::split.Tensor", "aten::split_with_sizes.default")
@by_parts
def split(g: Translator, node: fx.Node, x: Any, sizes: Any, dim: int = 0) -> tuple[Value, ...]:
    """Cut a dimension into consecutive pieces."""
    whole = shape_of(node)[dim]
    if isinstance(sizes, int) and isinstance(whole, str):
        raise ExportError(
            f"{op_name(node.target)} of a dimension whose size is known at run time only",
            hint="split it by sizes, or slice it",
        )
    if isinstance(sizes, int):
        each = math.ceil(whole / sizes) if "chunk" in op_name(node.target) else sizes
        sizes = [min(each, whole - at) for at in range(0, whole, each)]
    hints = [f"piece{i}" for i in range(len(sizes))]
    return g.graph.ops("Split", g.tensor(x), g.shape(sizes), hints=hints, axis=dim)
