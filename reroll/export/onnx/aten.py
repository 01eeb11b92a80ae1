"""The lowering of ATen operators: arithmetic, logic, activations and reductions."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from reroll.errors import ExportError
from reroll.export.onnx.complex_numbers import Complex, by_parts, complex_binary
from reroll.export.onnx.graph import Value
from reroll.export.onnx.parameters import Parameter, Size, Varying
from reroll.export.onnx.translate import TARGET, repeated
from reroll.rewrite.lowerings import lowering, op_name
from reroll.rewrite.raising.matching import shape

if TYPE_CHECKING:
    from reroll.export.onnx.translate import Translator

INT = torch.int64


# ---- arithmetic

_BINARY = {
    "aten::add.Tensor": "Add",
    "aten::add.Scalar": "Add",
    "aten::sub.Tensor": "Sub",
    "aten::sub.Scalar": "Sub",
    "aten::mul.Tensor": "Mul",
    "aten::mul.Scalar": "Mul",
    "aten::multiply.Tensor": "Mul",
    "aten::multiply.Scalar": "Mul",
    "aten::subtract.Tensor": "Sub",
    "aten::subtract.Scalar": "Sub",
    "aten::divide.Tensor": "Div",
    "aten::divide.Scalar": "Div",
    "aten::true_divide.Tensor": "Div",
    "aten::true_divide.Scalar": "Div",
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


# what arithmetic on booleans is
_BOOLEAN = {"Add": "Or", "Mul": "And", "Max": "Or", "Min": "And"}


@lowering(TARGET, *_BINARY)
def binary(g: Translator, node: fx.Node, a: Any, b: Any, alpha: Any = 1) -> Any:
    """Two operands, in the dtype of the result."""
    kind = _BINARY[op_name(node.target)]
    if isinstance(a, Complex) or isinstance(b, Complex):
        return complex_binary(g, node, kind, a, b)
    dtype, rank = g.dtype(node), len(shape(node))
    if dtype == torch.bool:
        return g.op(_BOOLEAN[kind], g.tensor(a, dtype, rank), g.tensor(b, dtype, rank))
    if kind in ("Mul", "Add") and b == (1 if kind == "Mul" else 0) and isinstance(a, Value):
        return g.cast(a, dtype)
    left, right = g.tensor(a, dtype, rank), g.tensor(b, dtype, rank)
    if alpha != 1:
        right = g.op("Mul", right, g.number(alpha, dtype))
    scaled = isinstance(a, Value) and not isinstance(b, Value | Parameter | Size)
    return repeated(g.op(kind, left, right), scaled and left.repeated)


@lowering(TARGET, "aten::rsub.Scalar", "aten::rsub.Tensor")
def rsub(g: Translator, node: fx.Node, a: Any, b: Any, alpha: Any = 1) -> Value:
    """B - alpha * a."""
    dtype, rank = g.dtype(node), len(shape(node))
    left = g.tensor(a, dtype, rank)
    if alpha != 1:
        left = g.op("Mul", left, g.number(alpha, dtype))
    return g.op("Sub", g.tensor(b, dtype, rank), left)


@lowering(
    TARGET,
    "aten::floor_divide.default",
    "aten::floor_divide.Scalar",
    "aten::div.Tensor_mode",
    "aten::div.Scalar_mode",
)
def divide_rounded(
    g: Translator, node: fx.Node, a: Any, b: Any, rounding_mode: str | None = "floor"
) -> Value:
    """A quotient that is rounded down, or towards zero."""
    dtype, rank = g.dtype(node), len(shape(node))
    left, right = g.tensor(a, dtype, rank), g.tensor(b, dtype, rank)
    if dtype.is_floating_point:
        made = g.op("Div", left, right)
        if rounding_mode is None:
            return made
        return g.op("Floor", made) if rounding_mode == "floor" else truncated(g, made)
    if rounding_mode == "floor":
        # Div of integers rounds towards zero; less the remainder, it rounds nothing
        left = g.op("Sub", left, g.op("Mod", left, right))
    return g.op("Div", left, right)


def truncated(g: Translator, x: Value) -> Value:
    """Without its fraction."""
    return g.op("Mul", g.op("Sign", x), g.op("Floor", g.op("Abs", x)))


@lowering(TARGET, "aten::trunc.default")
def trunc(g: Translator, node: fx.Node, x: Any) -> Value:
    """Without its fraction."""
    return truncated(g, g.tensor(x))


@lowering(TARGET, "aten::remainder.Tensor", "aten::remainder.Scalar")
def remainder(g: Translator, node: fx.Node, a: Any, b: Any) -> Value:
    """What a division leaves, with the sign of the divisor."""
    dtype, rank = g.dtype(node), len(shape(node))
    left, right = g.tensor(a, dtype, rank), g.tensor(b, dtype, rank)
    if not dtype.is_floating_point:
        return g.op("Mod", left, right)
    # Mod of floats has the sign of the dividend
    made = g.op("Mod", left, right, fmod=1)
    other = g.op("Less", g.op("Mul", made, right), g.number(0, dtype), dtype=torch.bool)
    return g.op("Where", other, g.op("Add", made, right), made, dtype=dtype)


@lowering(TARGET, "aten::fmod.Tensor", "aten::fmod.Scalar")
def fmod(g: Translator, node: fx.Node, a: Any, b: Any) -> Value:
    """What a division leaves, with the sign of the dividend."""
    dtype, rank = g.dtype(node), len(shape(node))
    return g.op("Mod", g.tensor(a, dtype, rank), g.tensor(b, dtype, rank), fmod=1)


@lowering(TARGET, "aten::addcmul.default", "aten::addcdiv.default")
def add_scaled(g: Translator, node: fx.Node, x: Any, a: Any, b: Any, *, value: Any = 1) -> Value:
    """A tensor plus the product or the quotient of two others."""
    dtype, rank = g.dtype(node), len(shape(node))
    kind = "Mul" if "mul" in op_name(node.target) else "Div"
    made = g.op(kind, g.tensor(a, dtype, rank), g.tensor(b, dtype, rank))
    if value != 1:
        made = g.op("Mul", made, g.number(value, dtype))
    return g.op("Add", g.tensor(x, dtype, rank), made)


@lowering(TARGET, "aten::lerp.Scalar", "aten::lerp.Tensor")
def lerp(g: Translator, node: fx.Node, a: Any, b: Any, weight: Any) -> Value:
    """What lies between two tensors."""
    dtype, rank = g.dtype(node), len(shape(node))
    left = g.tensor(a, dtype, rank)
    way = g.op("Sub", g.tensor(b, dtype, rank), left)
    return g.op("Add", left, g.op("Mul", way, g.tensor(weight, dtype, rank)))


_COMPARISONS = {
    f"aten::{name}.{overload}": kind
    for name, kind in {
        "gt": "Greater",
        "greater": "Greater",
        "ge": "GreaterOrEqual",
        "greater_equal": "GreaterOrEqual",
        "lt": "Less",
        "less": "Less",
        "le": "LessOrEqual",
        "less_equal": "LessOrEqual",
        "eq": "Equal",
    }.items()
    for overload in ("Tensor", "Scalar")
}


_UNEQUAL = [f"aten::{name}.{kind}" for name in ("ne", "not_equal") for kind in ("Tensor", "Scalar")]


@lowering(TARGET, *_COMPARISONS, *_UNEQUAL)
def compare(g: Translator, node: fx.Node, a: Any, b: Any) -> Value:
    """A comparison of two operands in their common dtype."""
    left, right = together(g, a, b)
    kind = _COMPARISONS.get(op_name(node.target))
    if kind is not None:
        if kind != "Equal" and left.dtype == torch.bool:
            left, right = g.cast(left, INT), g.cast(right, INT)
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


# of booleans, and of integers bit by bit
_LOGIC = {
    "aten::logical_and.default": ("And", ""),
    "aten::logical_or.default": ("Or", ""),
    "aten::logical_xor.default": ("Xor", ""),
    "aten::logical_not.default": ("Not", ""),
    "aten::bitwise_and.Tensor": ("And", "BitwiseAnd"),
    "aten::bitwise_and.Scalar": ("And", "BitwiseAnd"),
    "aten::__and__.Scalar": ("And", "BitwiseAnd"),
    "aten::__or__.Scalar": ("Or", "BitwiseOr"),
    "aten::bitwise_or.Tensor": ("Or", "BitwiseOr"),
    "aten::bitwise_or.Scalar": ("Or", "BitwiseOr"),
    "aten::bitwise_xor.Tensor": ("Xor", "BitwiseXor"),
    "aten::bitwise_not.default": ("Not", "BitwiseNot"),
    "aten::__and__.Tensor": ("And", "BitwiseAnd"),
    "aten::__or__.Tensor": ("Or", "BitwiseOr"),
}


@lowering(TARGET, *_LOGIC)
def logic(g: Translator, node: fx.Node, *operands: Any) -> Value:
    """Logic on booleans, or on the bits of integers."""
    dtype, rank = g.dtype(node), len(shape(node))
    truth, bits = _LOGIC[op_name(node.target)]
    kind = truth if dtype == torch.bool else bits
    return g.op(kind, *(g.tensor(v, dtype, rank) for v in operands))


_UNARY = {
    "aten::neg.default": "Neg",
    "aten::negative.default": "Neg",
    "aten::abs.default": "Abs",
    "aten::absolute.default": "Abs",
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
    "aten::ceil.default": "Ceil",
    "aten::round.default": "Round",
    "aten::sign.default": "Sign",
    "aten::erf.default": "Erf",
    "aten::tan.default": "Tan",
    "aten::atan.default": "Atan",
    "aten::acos.default": "Acos",
    "aten::asin.default": "Asin",
    "aten::sinh.default": "Sinh",
    "aten::cosh.default": "Cosh",
    "aten::hardswish.default": "HardSwish",
    "aten::mish.default": "Mish",
}


@lowering(TARGET, *_UNARY)
def unary(g: Translator, node: fx.Node, x: Any) -> Value:
    """A function of one operand, element by element."""
    x = g.tensor(x, g.dtype(node))
    return repeated(g.op(_UNARY[op_name(node.target)], x), x.repeated)


@lowering(TARGET, "aten::isnan.default", "aten::isinf.default")
def test(g: Translator, node: fx.Node, x: Any) -> Value:
    """Which elements are no number, or infinite."""
    x = g.tensor(x)
    if not x.dtype.is_floating_point:
        return g.op("Not", g.op("Equal", x, x, dtype=torch.bool))
    return g.op("IsNaN" if "nan" in op_name(node.target) else "IsInf", x, dtype=torch.bool)


@lowering(TARGET, "aten::nan_to_num.default")
def nan_to_num(
    g: Translator,
    node: fx.Node,
    x: Any,
    nan: float | None = None,
    posinf: float | None = None,
    neginf: float | None = None,
) -> Value:
    """Numbers in the place of what is none, and of infinities."""
    dtype = g.dtype(node)
    largest, x = torch.finfo(dtype).max, g.tensor(x, dtype)
    above, below = (
        g.op("IsInf", x, dtype=torch.bool, **{f"detect_{other}": 0})
        for other in ("negative", "positive")
    )
    for mark, value, default in (
        (g.op("IsNaN", x, dtype=torch.bool), nan, 0.0),
        (above, posinf, largest),
        (below, neginf, -largest),
    ):
        filled = g.number(default if value is None else value, dtype)
        x = g.op("Where", mark, filled, x, dtype=dtype)
    return x


@lowering(TARGET, "aten::square.default")
def square(g: Translator, node: fx.Node, x: Any) -> Value:
    """X * x."""
    x = g.tensor(x, g.dtype(node))
    return g.op("Mul", x, x)


@lowering(TARGET, "aten::expm1.default")
def expm1(g: Translator, node: fx.Node, x: Any) -> Value:
    """exp(x) - 1, as tanh(x / 2) (exp(x) + 1): near zero nothing cancels."""
    dtype = g.dtype(node)
    x = g.tensor(x, dtype)
    half = g.op("Tanh", g.op("Mul", x, g.number(0.5, dtype)))
    return g.op("Mul", half, g.op("Add", g.op("Exp", x), g.number(1.0, dtype)))


@lowering(TARGET, "aten::log1p.default")
def log1p(g: Translator, node: fx.Node, x: Any) -> Value:
    """log(1 + x); what rounding took from 1 + x is made up for by a factor."""
    dtype = g.dtype(node)
    x, one = g.tensor(x, dtype), g.number(1.0, dtype)
    whole = g.op("Add", x, one)
    ratio = g.op("Div", x, g.op("Sub", whole, one))
    tiny = g.op("Equal", whole, one, dtype=torch.bool)
    return g.op("Where", tiny, x, g.op("Mul", g.op("Log", whole), ratio), dtype=dtype)


@lowering(TARGET, "aten::exp2.default", "aten::log2.default")
def base_two(g: Translator, node: fx.Node, x: Any) -> Value:
    """Powers and logarithms of two."""
    dtype = g.dtype(node)
    x = g.tensor(x, dtype)
    if "exp" in op_name(node.target):
        return g.op("Pow", g.number(2.0, dtype), x)
    return g.op("Div", g.op("Log", x), g.number(math.log(2), dtype))


# of Giles, "Approximating the erfinv function" (2012), in single precision: highest power first
_ERFINV_CENTRE = (
    2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087,
    -0.00125372503, -0.00417768164, 0.246640727, 1.50140941,
)  # fmt: skip
_ERFINV_TAIL = (
    -0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773,
    -0.0076224613, 0.00943887047, 1.00167406, 2.83297682,
)  # fmt: skip


@lowering(TARGET, "aten::erfinv.default")
def erfinv(g: Translator, node: fx.Node, x: Any) -> Value:
    """The inverse of erf, by two polynomials: one for the centre, one for the tails."""
    kind = torch.float32
    x, one = g.tensor(x, kind), g.number(1.0, kind)
    rest = g.op("Mul", g.op("Sub", one, x), g.op("Add", one, x))
    w = g.op("Neg", g.op("Log", rest))
    centre = _polynomial(g, g.op("Sub", w, g.number(2.5, kind)), _ERFINV_CENTRE)
    tail = _polynomial(g, g.op("Sub", g.op("Sqrt", w), g.number(3.0, kind)), _ERFINV_TAIL)
    near = g.op("Less", w, g.number(5.0, kind), dtype=torch.bool)
    made = g.op("Mul", g.op("Where", near, centre, tail, dtype=kind), x)
    return g.cast(made, g.dtype(node))


def _polynomial(g: Translator, x: Value, factors: tuple[float, ...]) -> Value:
    """Horner's rule, the factor of the highest power first."""
    made = g.number(factors[0], x.dtype)
    for factor in factors[1:]:
        made = g.op("Add", g.op("Mul", made, x), g.number(factor, x.dtype))
    return made


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


@lowering(TARGET, "aten::leaky_relu.default")
def leaky_relu(g: Translator, node: fx.Node, x: Any, slope: float = 0.01) -> Value:
    """What is below zero, times a slope."""
    return g.op("LeakyRelu", g.tensor(x), alpha=slope)


@lowering(TARGET, "aten::elu.default")
def elu(
    g: Translator, node: fx.Node, x: Any, alpha: float = 1, scale: float = 1, input_scale: float = 1
) -> Value:
    """An exponential below zero, a line above."""
    x = g.tensor(x)
    low = g.op("Mul", expm1(g, node, _times(g, x, input_scale)), g.number(alpha, x.dtype))
    positive = g.op("Greater", x, g.number(0, x.dtype), dtype=torch.bool)
    return _times(g, g.op("Where", positive, x, low, dtype=x.dtype), scale)


def _times(g: Translator, x: Value, factor: float) -> Value:
    return x if factor == 1 else g.op("Mul", x, g.number(factor, x.dtype))


@lowering(TARGET, "aten::hardtanh.default", "aten::relu6.default", "aten::hardsigmoid.default")
def bounded(g: Translator, node: fx.Node, x: Any, low: float = -1.0, high: float = 1.0) -> Value:
    """A line between two bounds."""
    x, name = g.tensor(x), op_name(node.target)
    if "hardsigmoid" in name:
        return g.op("HardSigmoid", x, alpha=1 / 6, beta=0.5)
    low, high = (0.0, 6.0) if "relu6" in name else (low, high)
    return g.op("Clip", x, g.number(low, x.dtype), g.number(high, x.dtype))


@lowering(
    TARGET,
    "aten::clamp.default",
    "aten::clamp.Tensor",
    "aten::clip.default",
    "aten::clip.Tensor",
    "aten::clamp_min.default",
    "aten::clamp_min.Tensor",
    "aten::clamp_max.default",
    "aten::clamp_max.Tensor",
)
def clamp(
    g: Translator, node: fx.Node, x: Any, first: Any = None, second: Any = None, **bounds: Any
) -> Value:
    """Bounds on either side."""
    low = bounds.get("min", first)
    high = bounds.get("max", second)
    if "clamp_max" in op_name(node.target):
        low, high = None, first
    x = g.tensor(x, g.dtype(node))
    for kind, bound, nothing in (("Max", low, -math.inf), ("Min", high, math.inf)):
        if isinstance(bound, Varying):
            bound = replace(bound, values=tuple(nothing if v is None else v for v in bound.values))
        if bound is not None:
            x = g.op(kind, x, g.tensor(bound, x.dtype))
    return x


@lowering(
    TARGET,
    "aten::where.self",
    "aten::where.Scalar",
    "aten::where.ScalarSelf",
    "aten::where.ScalarOther",
)
def where(g: Translator, node: fx.Node, condition: Any, a: Any, b: Any) -> Value:
    """Elements of `a` or of `b`."""
    dtype, rank = g.dtype(node), len(shape(node))
    sides = g.tensor(a, dtype, rank), g.tensor(b, dtype, rank)
    return g.op("Where", g.tensor(condition, torch.bool), *sides, dtype=dtype)


@lowering(TARGET, "aten::masked_fill.Scalar", "aten::masked_fill.Tensor")
def masked_fill(g: Translator, node: fx.Node, x: Any, mask: Any, value: Any) -> Value:
    """One number where a mask is true."""
    return where(g, node, mask, _finite(g, value, g.dtype(node)), x)


def _finite(g: Translator, value: Any, dtype: torch.dtype) -> Any:
    """A number that a narrower dtype than the Program's can hold."""
    if isinstance(value, int | float) and dtype.is_floating_point and math.isfinite(value):
        bound = torch.finfo(dtype)
        return min(max(value, bound.min), bound.max)
    return value


@lowering(
    TARGET,
    "aten::to.dtype",
    "aten::to.other",
    "aten::to.device",
    "aten::to.dtype_layout",
    "aten::_to_copy.default",
    "aten::type_as.default",
)
def to(g: Translator, node: fx.Node, x: Any, dtype: Any = None, *_: Any, **__: Any) -> Any:
    """A conversion; where the Program widens a half precision, there may be nothing to do."""
    return g.tensor(x, g.dtype(node))


@lowering(
    TARGET,
    "aten::clone.default",
    "aten::contiguous.default",
    "aten::dropout.default",
    "aten::feature_dropout.default",
    "aten::detach.default",
    "aten::alias.default",
    "aten::lift_fresh_copy.default",
    "aten::positive.default",
    "aten::resolve_conj.default",
    "aten::resolve_neg.default",
)
@by_parts
def same(g: Translator, node: fx.Node, x: Any, *_: Any, **__: Any) -> Value:
    """The tensor itself."""
    return g.tensor(x)


# ---- reductions

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
    """A reduction over dimensions; over all if none is given."""
    x = g.tensor(x, g.dtype(node))
    return g.op(_REDUCTIONS[op_name(node.target)], x, axes(g, node, dim), keepdims=int(keepdim))


def axes(g: Translator, node: fx.Node, dim: Any) -> Value:
    """The dimensions that a reduction goes over."""
    rank = len(shape(node.args[0]))  # type: ignore[arg-type]
    if isinstance(dim, int):
        dim = [dim]
    return g.ints(*(dim or range(rank)))


@lowering(
    TARGET,
    "aten::any.default",
    "aten::any.dim",
    "aten::all.default",
    "aten::all.dim",
    "aten::_is_any_true.default",
    "aten::_is_all_true.default",
)
def any_all(g: Translator, node: fx.Node, x: Any, dim: Any = (), keepdim: bool = False) -> Value:
    """Whether one, or each, of the elements along some dimensions is not zero."""
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
    """The variance or the standard deviation."""
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


@lowering(
    TARGET,
    "aten::linalg_vector_norm.default",
    "aten::norm.ScalarOpt_dim",
    "aten::norm.Scalar",
)
def norm(
    g: Translator,
    node: fx.Node,
    x: Any,
    order: Any = 2,
    dim: Any = (),
    keepdim: bool = False,
    **_: Any,
) -> Value:
    """The length of vectors."""
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
    """The largest or smallest elements of a dimension, and where they are."""
    kind = "Max" if "max" in op_name(node.target) else "Min"
    x = g.tensor(x)
    values = g.op(f"Reduce{kind}", x, g.ints(dim), keepdims=int(keepdim))
    return values, g.op(f"Arg{kind}", x, axis=dim, keepdims=int(keepdim), dtype=INT)


@lowering(TARGET, "aten::argmax.default", "aten::argmin.default")
def arg_extreme(
    g: Translator, node: fx.Node, x: Any, dim: int | None = None, keepdim: bool = False
) -> Value:
    """Where the largest or smallest element of a dimension, or of all, is."""
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
    """Softmax over one dimension."""
    name, dtype = op_name(node.target), g.dtype(node)
    x = g.tensor(x, dtype)
    made = g.op("LogSoftmax" if "log" in name else "Softmax", x, axis=dim)
    if "safe" not in name:
        return made
    # rows of which nothing is above minus infinity are zero
    lowest = g.number(-math.inf, dtype)
    highest = g.op("ReduceMax", x, g.ints(dim), keepdims=1)
    empty = g.op("Equal", highest, lowest, dtype=torch.bool)
    return g.op("Where", empty, g.number(0, dtype), made, dtype=dtype)


@lowering(TARGET, "aten::cumsum.default")
def cumsum(g: Translator, node: fx.Node, x: Any, dim: int, **_: Any) -> Value:
    """Running sums."""
    return g.op("CumSum", g.tensor(x, g.dtype(node)), g.number(dim, INT))


@lowering(TARGET, "aten::cosine_similarity.default")
def cosine_similarity(
    g: Translator, node: fx.Node, a: Any, b: Any, dim: int = 1, eps: float = 1e-8
) -> Value:
    """The cosine of the angle between vectors."""
    a, b = g.tensor(a), g.tensor(b)
    product = g.op("ReduceSum", g.op("Mul", a, b), g.ints(dim), keepdims=0)
    lengths = [
        g.op("Max", g.op("ReduceL2", v, g.ints(dim), keepdims=0), g.number(eps, v.dtype))
        for v in (a, b)
    ]
    return g.op("Div", product, g.op("Mul", *lengths))
