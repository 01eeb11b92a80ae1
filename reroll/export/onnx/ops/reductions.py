"""Lower reductions (sums, extremes, norms, softmax), and ops that sort and count."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from reroll.errors import ExportError
from reroll.export.onnx.graph import TARGET, Value
from reroll.export.onnx.ops.arguments import shape_of
from reroll.export.onnx.ops.pointwise import together
from reroll.rewrite.ir.lowerings import lowering, op_name
from reroll.rewrite.ir.matching import shape

if TYPE_CHECKING:
    from reroll.export.onnx.emit.translate import Translator

INT = torch.int64
# the name of top-k indices, which are a choice; those of a full sort are none
CHOSEN = "chosen"

_REDUCTIONS = {
    "aten::mean.dim": "ReduceMean",
    "aten::mean.default": "ReduceMean",
    "aten::sum.dim_IntList": "ReduceSum",
    "aten::sum.default": "ReduceSum",
    "aten::amax.default": "ReduceMax",
    "aten::amin.default": "ReduceMin",
    "aten::max.default": "ReduceMax",
    "aten::min.default": "ReduceMin",
    "aten::prod.default": "ReduceProd",
    "aten::prod.dim_int": "ReduceProd",
    "aten::logsumexp.default": "ReduceLogSumExp",
}


@lowering(TARGET, *_REDUCTIONS)
def reduce(
    g: Translator, node: fx.Node, x: Any, dim: Any = (), keepdim: bool = False, **_: Any
) -> Value:
    """Reduce over dimensions; over all if none is given."""
    x = g.tensor(x, g.dtype(node))
    return g.op(_REDUCTIONS[op_name(node.target)], x, axes(g, node, dim), keepdims=int(keepdim))


def axes(g: Translator, node: fx.Node, dim: Any) -> Value:
    """Return the dimensions of a reduction."""
    rank = len(shape_of(node))
    if isinstance(dim, int):
        dim = [dim]
    return g.ints(*(dim or range(rank)))


@lowering(TARGET, "aten::any", "aten::all", "aten::_is_any_true", "aten::_is_all_true")
def any_all(g: Translator, node: fx.Node, x: Any, dim: Any = (), keepdim: bool = False) -> Value:
    """Return whether any, or all, elements along some dimensions are not zero."""
    kind = "ReduceMax" if "any" in op_name(node.target) else "ReduceMin"
    x = g.cast(g.tensor(x, torch.bool), torch.int32)
    return g.cast(g.op(kind, x, axes(g, node, dim), keepdims=int(keepdim)), torch.bool)


@lowering(
    TARGET,
    "aten::var.correction",
    "aten::var.dim",
    "aten::std.correction",
    "aten::std.dim",
)
def variance(
    g: Translator,
    node: fx.Node,
    x: Any,
    dim: Any = (),
    unbiased: bool = True,
    keepdim: bool = False,
    correction: float | None = None,
) -> Value:
    """Compute the variance or the standard deviation."""
    dtype = g.dtype(node)
    x, over = g.tensor(x, dtype), axes(g, node, dim)
    centred = g.op("Sub", x, g.op("ReduceMean", x, over, keepdims=1))
    squares = g.op("Mul", centred, centred)
    total = g.op("ReduceSum", squares, over, keepdims=int(keepdim))
    sizes = g.op("Gather", g.op("Shape", x, dtype=INT), over, axis=0)
    count = g.cast(g.op("ReduceProd", sizes, keepdims=0), dtype)
    less = correction if correction is not None else float(unbiased)
    made = g.op("Div", total, g.op("Sub", count, g.number(less, dtype)))
    return g.op("Sqrt", made) if "std" in op_name(node.target) else made


@lowering(TARGET, "aten::linalg_vector_norm", "aten::norm.ScalarOpt_dim", "aten::norm.Scalar")
def norm(
    g: Translator,
    node: fx.Node,
    x: Any,
    order: Any = 2,
    dim: Any = (),
    keepdim: bool = False,
    **_: Any,
) -> Value:
    """Compute the norm of vectors, of order 1, 2 or infinity."""
    x, over = g.tensor(x, g.dtype(node)), axes(g, node, dim)
    if order not in (None, 1, 2, math.inf):
        raise ExportError(f"a norm of order {order} has no lowering to ONNX")
    if order == math.inf:
        return g.op("ReduceMax", g.op("Abs", x), over, keepdims=int(keepdim))
    return g.op("ReduceL1" if order == 1 else "ReduceL2", x, over, keepdims=int(keepdim))


@lowering(TARGET, "aten::max.dim", "aten::min.dim")
def extreme(
    g: Translator, node: fx.Node, x: Any, dim: int, keepdim: bool = False
) -> tuple[Value, Value]:
    """Return the largest or smallest elements of a dimension, and their indices."""
    kind = "Max" if "max" in op_name(node.target) else "Min"
    x = g.tensor(x)
    values = g.op(f"Reduce{kind}", x, g.ints(dim), keepdims=int(keepdim))
    return values, g.op(f"Arg{kind}", x, axis=dim, keepdims=int(keepdim), dtype=INT)


@lowering(TARGET, "aten::argmax.default", "aten::argmin.default")
def arg_extreme(
    g: Translator, node: fx.Node, x: Any, dim: int | None = None, keepdim: bool = False
) -> Value:
    """Return the index of the largest or smallest element, in one dimension or of all."""
    kind = "ArgMax" if "max" in op_name(node.target) else "ArgMin"
    x = g.tensor(x)
    if dim is None:
        made = g.op(kind, g.op("Reshape", x, g.ints(-1)), axis=0, keepdims=0, dtype=INT)
        return g.op("Reshape", made, g.shape(shape(node)))
    return g.op(kind, x, axis=dim, keepdims=int(keepdim), dtype=INT)


@lowering(
    TARGET,
    "aten::softmax.int",
    "aten::_softmax.default",
    "aten::_safe_softmax.default",
    "aten::log_softmax.int",
    "aten::_log_softmax.default",
)
def softmax(g: Translator, node: fx.Node, x: Any, dim: int, *_: Any, **__: Any) -> Value:
    """Compute softmax or log-softmax over one dimension."""
    name, dtype = op_name(node.target), g.dtype(node)
    x = g.tensor(x, dtype)
    made = g.op("LogSoftmax" if "log" in name else "Softmax", x, axis=dim)
    if "safe" not in name:
        return made
    # rows whose elements are all minus infinity become zero
    lowest = g.number(-math.inf, dtype)
    highest = g.op("ReduceMax", x, g.ints(dim), keepdims=1)
    empty = g.op("Equal", highest, lowest, dtype=torch.bool)
    return g.op("Where", empty, g.number(0, dtype), made, dtype=dtype)


@lowering(TARGET, "aten::cumsum.default")
def cumsum(g: Translator, node: fx.Node, x: Any, dim: int, **_: Any) -> Value:
    """Compute cumulative sums."""
    return g.op("CumSum", g.tensor(x, g.dtype(node)), g.number(dim, INT))


@lowering(TARGET, "aten::cosine_similarity.default")
def cosine_similarity(
    g: Translator, node: fx.Node, a: Any, b: Any, dim: int = 1, eps: float = 1e-8
) -> Value:
    """Compute the cosine of the angle between vectors."""
    a, b = g.tensor(a), g.tensor(b)
    product = g.op("ReduceSum", g.op("Mul", a, b), g.ints(dim), keepdims=0)
    lengths = [
        g.op("Max", g.op("ReduceL2", v, g.ints(dim), keepdims=0), g.number(eps, v.dtype))
        for v in (a, b)
    ]
    return g.op("Div", product, g.op("Mul", *lengths))


# ---- sorting and counting


@lowering(TARGET, "aten::topk.default")
def topk(
    g: Translator,
    node: fx.Node,
    x: Any,
    count: Any,
    dim: int = -1,
    largest: bool = True,
    sorted_: bool = True,
    **_: Any,
) -> tuple[Value, Value]:
    """Return the largest or smallest elements of a dimension, and their indices."""
    return _top(g, g.tensor(x), g.shape([count]), dim, largest, CHOSEN)


@lowering(TARGET, "aten::sort.default", "aten::sort.stable", "aten::argsort.default")
def sort(
    g: Translator,
    node: fx.Node,
    x: Any,
    dim: int = -1,
    descending: bool = False,
    stable: bool | None = None,
) -> Any:
    """Sort a dimension, keeping the order of equal elements; also return the old indices."""
    x = g.tensor(x)
    size = g.op("Gather", g.op("Shape", x, dtype=INT), g.ints(dim), axis=0)
    made = _top(g, x, size, dim, descending)
    return made[1] if "argsort" in op_name(node.target) else made


def _top(
    g: Translator, x: Value, count: Value, dim: int, largest: bool, hint: str = "places"
) -> tuple[Value, Value]:
    """Apply TopK in a dtype that has a kernel; `hint` names the indices."""
    kind = x.dtype
    if kind not in (torch.float32, torch.float64, torch.int32, INT):
        x = g.cast(x, torch.float32 if kind.is_floating_point else INT)
    values, places = g.graph.ops(
        "TopK", x, count, hints=("values", hint), axis=dim, largest=int(largest)
    )
    return g.cast(values, kind), replace(places, dtype=INT)


@lowering(TARGET, "aten::one_hot.default")
def one_hot(g: Translator, node: fx.Node, x: Any, classes: int = -1) -> Value:
    """Return a column for each class, 1 in that of the element."""
    x = g.op("Unsqueeze", g.tensor(x, INT), g.ints(-1))
    columns = g.number(list(range(shape(node)[-1])), INT)
    return g.cast(g.op("Equal", x, columns, dtype=torch.bool), INT)


@lowering(TARGET, "aten::searchsorted.Tensor", "aten::bucketize.Tensor")
def searchsorted(
    g: Translator, node: fx.Node, a: Any, b: Any, *, right: bool = False, **_: Any
) -> Value:
    """Count the sorted numbers that are smaller than each value, or with `right` not larger."""
    numbers, values = (a, b) if "searchsorted" in op_name(node.target) else (b, a)
    left, of = together(g, numbers, values)
    left = g.op("Unsqueeze", left, g.ints(-2)) if len(_shape_of(node, 0)) > 1 else left
    of = g.op("Unsqueeze", of, g.ints(-1))
    before = g.op("LessOrEqual" if right else "Less", left, of, dtype=torch.bool)
    counts = g.op("ReduceSum", g.cast(before, INT), g.ints(-1), keepdims=0)
    return g.cast(counts, g.dtype(node))


def _shape_of(node: fx.Node, position: int) -> tuple[Any, ...]:
    """Return the shape of an argument by its position in `searchsorted`; `bucketize` swaps them."""
    place = position if "searchsorted" in op_name(node.target) else 1 - position
    source: Any = node.args[place]
    return shape(source)


@lowering(TARGET, "aten::histc.default")
def histc(
    g: Translator, node: fx.Node, x: Any, bins: int = 100, low: float = 0, high: float = 0
) -> Value:
    """Count the elements in each of some equal intervals."""
    dtype = g.dtype(node)
    if low == high and bins == 1:
        # a single interval between the bounds of the data has all elements: a mixture of one expert
        return g.cast(g.op("Reshape", g.op("Size", g.tensor(x), dtype=INT), g.ints(1)), dtype)
    if low == high:
        raise ExportError("histc between the bounds of its data has no lowering to ONNX")
    x = g.op("Reshape", g.tensor(x, dtype), g.ints(-1, 1))
    lowest, highest = g.number(low, dtype), g.number(high, dtype)
    scaled = g.op("Mul", g.op("Sub", x, lowest), g.number(bins, dtype))
    place = g.op("Floor", g.op("Div", scaled, g.number(high - low, dtype)))
    # the last interval includes its upper bound
    last = g.op("Equal", x, highest, dtype=torch.bool)
    place = g.op("Where", last, g.number(bins - 1, dtype), place, dtype=dtype)
    hits = g.op("Equal", place, g.number([list(range(bins))], dtype), dtype=torch.bool)
    return g.op("ReduceSum", g.cast(hits, dtype), g.ints(0), keepdims=0)
