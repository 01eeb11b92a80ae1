"""The lowering of ATen operators: arithmetic, shapes, and making tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from reroll.errors import ExportError
from reroll.export.onnx import heads
from reroll.export.onnx.graph import Value
from reroll.export.onnx.parameters import Parameter, Size, Varying
from reroll.export.onnx.translate import TARGET, repeated
from reroll.rewrite.lowerings import lowering

if TYPE_CHECKING:
    from reroll.export.onnx.translate import Translator

INT = torch.int64


def _rank(node: fx.Node) -> int:
    return len(node.meta["type"].shape)


def _before(node: fx.Node) -> tuple[Any, ...]:
    """The shape of a node's first argument."""
    source: Any = node.args[0]
    return tuple(source.meta["type"].shape)


# ---- arithmetic

_BINARY = {
    "aten::add.Tensor": "Add",
    "aten::add.Scalar": "Add",
    "aten::sub.Tensor": "Sub",
    "aten::sub.Scalar": "Sub",
    "aten::mul.Tensor": "Mul",
    "aten::mul.Scalar": "Mul",
    "aten::div.Tensor": "Div",
    "aten::div.Scalar": "Div",
    "aten::minimum.default": "Min",
    "aten::maximum.default": "Max",
    "aten::min.other": "Min",
    "aten::max.other": "Max",
    "aten::pow.Tensor_Tensor": "Pow",
    "aten::pow.Tensor_Scalar": "Pow",
    "aten::pow.Scalar": "Pow",
}


@lowering(TARGET, *_BINARY)
def binary(g: Translator, node: fx.Node, a: Any, b: Any, alpha: Any = 1) -> Value:
    """Two operands, in the dtype of the result."""
    kind, dtype, rank = _BINARY[_name(node)], g.dtype(node), _rank(node)
    if kind in ("Mul", "Add") and b == (1 if kind == "Mul" else 0) and isinstance(a, Value):
        return g.cast(a, dtype)
    left, right = g.tensor(a, dtype, rank), g.tensor(b, dtype, rank)
    if alpha != 1:
        right = g.op("Mul", right, g.number(alpha, dtype))
    scaled = isinstance(a, Value) and not isinstance(b, Value | Parameter | Size)
    return repeated(g.op(kind, left, right), scaled and left.repeated)


_COMPARISONS = {
    f"aten::{name}.{overload}": kind
    for name, kind in {
        "gt": "Greater",
        "ge": "GreaterOrEqual",
        "lt": "Less",
        "le": "LessOrEqual",
        "eq": "Equal",
    }.items()
    for overload in ("Tensor", "Scalar")
}


@lowering(TARGET, *_COMPARISONS, "aten::ne.Tensor", "aten::ne.Scalar")
def compare(g: Translator, node: fx.Node, a: Any, b: Any) -> Value:
    """A comparison of two operands in their common dtype."""
    left, right = together(g, a, b)
    kind = _COMPARISONS.get(_name(node))
    if kind is not None:
        return g.op(kind, left, right, dtype=torch.bool)
    return g.op("Not", g.op("Equal", left, right, dtype=torch.bool))


def together(g: Translator, a: Any, b: Any) -> tuple[Value, Value]:
    """Two operands in one dtype: numbers follow tensors, unless a float meets an integer."""
    values = [v if isinstance(v, int | float) else g.tensor(v) for v in (a, b)]
    dtypes = [v.dtype for v in values if isinstance(v, Value)]
    dtype = dtypes[0] if len(dtypes) == 1 else torch.promote_types(*dtypes)
    if not dtype.is_floating_point and any(isinstance(v, float) for v in values):
        dtype = torch.float32
    left, right = (g.tensor(v, dtype) for v in values)
    return left, right


_LOGIC = {
    "aten::logical_and.default": "And",
    "aten::logical_or.default": "Or",
    "aten::bitwise_and.Tensor": "And",
    "aten::bitwise_or.Tensor": "Or",
    "aten::logical_not.default": "Not",
    "aten::bitwise_not.default": "Not",
}


@lowering(TARGET, *_LOGIC)
def logic(g: Translator, node: fx.Node, *operands: Any) -> Value:
    """Logic on booleans."""
    return g.op(_LOGIC[_name(node)], *(g.tensor(v, torch.bool) for v in operands))


_UNARY = {
    "aten::neg.default": "Neg",
    "aten::abs.default": "Abs",
    "aten::exp.default": "Exp",
    "aten::log.default": "Log",
    "aten::sqrt.default": "Sqrt",
    "aten::reciprocal.default": "Reciprocal",
    "aten::cos.default": "Cos",
    "aten::sin.default": "Sin",
    "aten::tanh.default": "Tanh",
    "aten::sigmoid.default": "Sigmoid",
    "aten::relu.default": "Relu",
    "aten::floor.default": "Floor",
    "aten::erf.default": "Erf",
}


@lowering(TARGET, *_UNARY)
def unary(g: Translator, node: fx.Node, x: Any) -> Value:
    """A function of one operand, element by element."""
    x = g.tensor(x, g.dtype(node))
    return repeated(g.op(_UNARY[_name(node)], x), x.repeated)


@lowering(TARGET, "aten::rsqrt.default")
def rsqrt(g: Translator, node: fx.Node, x: Any) -> Value:
    """1 / sqrt(x)."""
    return g.op("Reciprocal", g.op("Sqrt", g.tensor(x)))


@lowering(TARGET, "aten::softplus.default")
def softplus(g: Translator, node: fx.Node, x: Any, beta: float = 1, threshold: float = 20) -> Value:
    """log(1 + exp(beta x)) / beta; what is above the threshold is so far off only by rounding."""
    x = g.tensor(x)
    factor = g.number(beta, x.dtype)
    return g.op("Div", g.op("Softplus", g.op("Mul", x, factor)), factor)


@lowering(TARGET, "aten::log_sigmoid.default")
def log_sigmoid(g: Translator, node: fx.Node, x: Any) -> Value:
    """-softplus(-x), which does not overflow."""
    return g.op("Neg", g.op("Softplus", g.op("Neg", g.tensor(x))))


@lowering(TARGET, "aten::silu.default")
def silu(g: Translator, node: fx.Node, x: Any) -> Value:
    """X * sigmoid(x)."""
    x = g.tensor(x)
    return g.op("Mul", x, g.op("Sigmoid", x))


@lowering(TARGET, "aten::gelu.default")
def gelu(g: Translator, node: fx.Node, x: Any, approximate: str = "none") -> Value:
    """Gelu, exact or by tanh."""
    return g.op("Gelu", g.tensor(x), approximate=approximate)


@lowering(TARGET, "aten::clamp.default", "aten::clamp_min.default", "aten::clamp_max.default")
def clamp(
    g: Translator, node: fx.Node, x: Any, first: Any = None, second: Any = None, **bounds: Any
) -> Value:
    """Bounds on either side."""
    low = bounds.get("min", first)
    high = bounds.get("max", second)
    if _name(node) == "aten::clamp_max.default":
        low, high = None, first
    x = g.tensor(x)
    for kind, bound, nothing in (("Max", low, -math.inf), ("Min", high, math.inf)):
        if isinstance(bound, Varying):
            bound = replace(bound, values=tuple(nothing if v is None else v for v in bound.values))
        if bound is not None:
            x = g.op(kind, x, g.tensor(bound, x.dtype))
    return x


@lowering(TARGET, "aten::where.self")
def where(g: Translator, node: fx.Node, condition: Any, a: Any, b: Any) -> Value:
    """Elements of `a` or of `b`."""
    dtype, rank = g.dtype(node), _rank(node)
    sides = g.tensor(a, dtype, rank), g.tensor(b, dtype, rank)
    return g.op("Where", g.tensor(condition, torch.bool), *sides, dtype=dtype)


@lowering(TARGET, "aten::to.dtype", "aten::_to_copy.default")
def to(g: Translator, node: fx.Node, x: Any, dtype: Any = None, *_: Any, **__: Any) -> Value:
    """A conversion; where the Program widens a half precision, there may be nothing to do."""
    return g.tensor(x, g.dtype(node))


@lowering(
    TARGET,
    "aten::clone.default",
    "aten::contiguous.default",
    "aten::dropout.default",
    "aten::detach.default",
)
def same(g: Translator, node: fx.Node, x: Any, *_: Any, **__: Any) -> Value:
    """The tensor itself."""
    return g.tensor(x)


# ---- reductions


@lowering(
    TARGET, "aten::mean.dim", "aten::sum.dim_IntList", "aten::amax.default", "aten::amin.default"
)
def reduce(
    g: Translator, node: fx.Node, x: Any, dim: Any = (), keepdim: bool = False, **_: Any
) -> Value:
    """A reduction over dimensions."""
    kinds = {"mean": "ReduceMean", "sum": "ReduceSum", "amax": "ReduceMax", "amin": "ReduceMin"}
    kind = kinds[_name(node).split("::")[1].split(".")[0]]
    axes = [dim] if isinstance(dim, int) else list(dim or range(len(_before(node))))
    x = g.tensor(x, g.dtype(node))
    return g.op(kind, x, g.ints(*axes), keepdims=int(keepdim))


@lowering(TARGET, "aten::softmax.int", "aten::_softmax.default", "aten::log_softmax.int")
def softmax(g: Translator, node: fx.Node, x: Any, dim: int, *_: Any, **__: Any) -> Value:
    """Softmax over one dimension."""
    kind = "LogSoftmax" if "log" in _name(node) else "Softmax"
    return g.op(kind, g.tensor(x, g.dtype(node)), axis=dim)


@lowering(TARGET, "aten::cumsum.default")
def cumsum(g: Translator, node: fx.Node, x: Any, dim: int, **_: Any) -> Value:
    """Running sums."""
    return g.op("CumSum", g.tensor(x, g.dtype(node)), g.number(dim, INT))


# ---- shapes


@lowering(TARGET, "aten::unsqueeze.default")
def unsqueeze(g: Translator, node: fx.Node, x: Any, dim: int) -> Value:
    """A new dimension of size one."""
    x, rank = g.tensor(x), _rank(node)
    return repeated(g.op("Unsqueeze", x, g.ints(dim % rank)), x.repeated and dim % rank < rank - 1)


@lowering(TARGET, "aten::squeeze.dim")
def squeeze(g: Translator, node: fx.Node, x: Any, dim: int) -> Value:
    """Without a dimension of size one."""
    if len(_before(node)) == _rank(node):
        return g.tensor(x)
    return g.op("Squeeze", g.tensor(x), g.ints(dim))


@lowering(
    TARGET,
    "aten::reshape.default",
    "aten::view.default",
    "aten::_unsafe_view.default",
    "aten::flatten.using_ints",
    "aten::unflatten.int",
)
def reshape(g: Translator, node: fx.Node, x: Any, *_: Any) -> Value:
    """All that only gives elements other indices, from the shapes before and after."""
    return heads.reshape(g, g.tensor(x), _before(node), node.meta["type"].shape)


@lowering(TARGET, "aten::transpose.int", "aten::t.default")
def transpose(g: Translator, node: fx.Node, x: Any, a: int = 0, b: int = 1) -> Value:
    """Two dimensions exchanged."""
    order = list(range(_rank(node)))
    order[a], order[b] = order[b], order[a]
    return heads.transpose(g, g.tensor(x), order)


@lowering(TARGET, "aten::permute.default")
def permute(g: Translator, node: fx.Node, x: Any, dims: Sequence[int]) -> Value:
    """Dimensions in another order."""
    return heads.transpose(g, g.tensor(x), [d % len(dims) for d in dims])


@lowering(TARGET, "aten::expand.default")
def expand(g: Translator, node: fx.Node, x: Any, sizes: Sequence[Any], **_: Any) -> Value:
    """Dimensions of size one repeated; the shape is the result's."""
    dims = node.meta["type"].shape
    if any(isinstance(s, int) and s == -1 for s in sizes):
        dims = [
            1 if isinstance(s, int) and s == -1 else d for s, d in zip(sizes, dims, strict=True)
        ]
    return g.op("Expand", g.tensor(x), g.shape(dims))


@lowering(TARGET, "aten::constant_pad_nd.default")
def constant_pad(
    g: Translator, node: fx.Node, x: Any, sizes: Sequence[int], fill: Any = 0
) -> Value:
    """A border of one number; `sizes` are before and after, the last dimension first."""
    x = g.tensor(x)
    others = [0] * (_rank(node) - len(sizes) // 2)
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
    """A border of one number."""
    if mode != "constant":
        raise ExportError(f"a border of the kind {mode!r} has no lowering to ONNX")
    return constant_pad(g, node, x, sizes, value)


@lowering(TARGET, "aten::cat.default")
def cat(g: Translator, node: fx.Node, parts: Sequence[Any], dim: int = 0) -> Value:
    """Tensors one after the other."""
    rank, dtype = _rank(node), g.dtype(node)
    values = [g.tensor(v, dtype, rank) for v in parts]
    twice = len(values) == 2 and values[0].name == values[1].name and dim % rank == rank - 1
    return repeated(g.op("Concat", *values, axis=dim), twice)


@lowering(TARGET, "aten::stack.default")
def stack(g: Translator, node: fx.Node, parts: Sequence[Any], dim: int = 0) -> Value:
    """Tensors along a new dimension."""
    axis = dim % _rank(node)
    lifted = [g.op("Unsqueeze", g.tensor(v, g.dtype(node)), g.ints(axis)) for v in parts]
    return g.op("Concat", *lifted, axis=axis)


@lowering(TARGET, "aten::slice.Tensor")
def slice_(
    g: Translator,
    node: fx.Node,
    x: Any,
    dim: int = 0,
    start: Any = None,
    end: Any = None,
    step: int = 1,
) -> Value:
    """Every `step`-th element from `start` to before `end`."""
    x = g.tensor(x)
    last = 2**62 if end is None else end
    bounds = [g.shape([v]) for v in (start or 0, last)]
    return g.op("Slice", x, *bounds, g.ints(dim), g.ints(step))


@lowering(TARGET, "aten::select.int")
def select(g: Translator, node: fx.Node, x: Any, dim: int, index: Any) -> Value:
    """One index of a dimension, which goes."""
    place = g.number(index, INT) if isinstance(index, int) else g.tensor(index)
    return g.op("Gather", g.tensor(x), place, axis=dim)


@lowering(TARGET, "aten::chunk.default", "aten::split.Tensor", "aten::split_with_sizes.default")
def split(g: Translator, node: fx.Node, x: Any, sizes: Any, dim: int = 0) -> tuple[Value, ...]:
    """Consecutive pieces of a dimension."""
    whole = _before(node)[dim]
    if isinstance(sizes, int):
        each = math.ceil(whole / sizes) if "chunk" in _name(node) else sizes
        sizes = [min(each, whole - at) for at in range(0, whole, each)]
    hints = [f"piece{i}" for i in range(len(sizes))]
    return g.graph.ops("Split", g.tensor(x), g.ints(*sizes), hints=hints, axis=dim)


@lowering(TARGET, "aten::sym_size.int")
def sym_size(g: Translator, node: fx.Node, x: Any, dim: int) -> Any:
    """The size of a dimension."""
    return g.size(_before(node)[dim])


@lowering(
    TARGET, "operator.add", "operator.sub", "operator.mul", "operator.floordiv", "operator.mod"
)
def size_arithmetic(g: Translator, node: fx.Node, a: Any, b: Any) -> Any:
    """Arithmetic with sizes."""
    kinds = {"add": "Add", "sub": "Sub", "mul": "Mul", "floordiv": "Div", "mod": "Mod"}
    kind = kinds[_name(node).split(".")[1]]
    return Size(g, g.op(kind, g.shape([a]), g.shape([b])))


# ---- making tensors


@lowering(TARGET, "aten::arange.default", "aten::arange.start", "aten::arange.start_step")
def arange(g: Translator, node: fx.Node, *bounds: Any, **_: Any) -> Value:
    """Numbers from start (0) to before the end, by steps (1)."""
    start, end, step = 0, bounds[0], 1
    if len(bounds) > 1:
        start, end = bounds[:2]
    if len(bounds) > 2:
        step = bounds[2]
    made = g.op("Range", *(g.tensor(v, INT) for v in (start, end, step)))
    return g.cast(made, g.dtype(node))


@lowering(
    TARGET,
    "aten::full.default",
    "aten::zeros.default",
    "aten::ones.default",
    "aten::full_like.default",
    "aten::zeros_like.default",
    "aten::ones_like.default",
    "aten::scalar_tensor.default",
)
def full(g: Translator, node: fx.Node, first: Any, value: Any = None, **_: Any) -> Value:
    """A tensor of one value, in the shape of the result."""
    name, dtype = _name(node), g.dtype(node)
    if name == "aten::scalar_tensor.default":
        return g.number(first, dtype)
    if "full" not in name:
        value = 1 if "ones" in name else 0
    dims = node.meta["type"].shape
    if dtype.is_floating_point:
        bound = torch.finfo(dtype)
        value = min(max(value, bound.min), bound.max)
    filled = g.number(value, dtype)
    return g.op("Expand", filled, g.shape(dims)) if dims else filled


# ---- look-up


@lowering(TARGET, "aten::index.Tensor")
def index(g: Translator, node: fx.Node, x: Any, indices: Sequence[Any]) -> Value:
    """Indexing with one tensor of indices, in any dimension."""
    given = [(axis, i) for axis, i in enumerate(indices) if i is not None]
    if len(given) != 1:
        raise ValueError("indexing in several dimensions at once is not supported")
    axis, where_ = given[0]
    return g.op("Gather", g.tensor(x), g.tensor(where_), axis=axis)


@lowering(TARGET, "aten::gather.default")
def gather(g: Translator, node: fx.Node, x: Any, dim: int, indices: Any, **_: Any) -> Value:
    """Elements by an index for each."""
    return g.op("GatherElements", g.tensor(x), g.tensor(indices, INT), axis=dim)


def _name(node: fx.Node) -> str:
    from reroll.rewrite.lowerings import op_name

    return op_name(node.target)
