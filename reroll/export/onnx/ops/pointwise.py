"""Lower element-wise ops: arithmetic, comparisons, logic, conversions, functions, activations."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from reroll.export.onnx.graph import TARGET, Value
from reroll.export.onnx.ops.arguments import Parameter, Size, Varying, repeated
from reroll.export.onnx.ops.complex_numbers import Complex, by_parts, complex_binary
from reroll.rewrite.ir.lowerings import lowering, op_name, without_overload
from reroll.rewrite.ir.matching import shape

if TYPE_CHECKING:
    from reroll.export.onnx.emit.translate import Translator

INT = torch.int64

_BINARY = {
    "aten::add": "Add",
    "aten::sub": "Sub",
    "aten::subtract": "Sub",
    "aten::mul": "Mul",
    "aten::multiply": "Mul",
    "aten::div": "Div",
    "aten::divide": "Div",
    "aten::true_divide": "Div",
    "aten::minimum": "Min",
    "aten::maximum": "Max",
    "aten::min.other": "Min",
    "aten::max.other": "Max",
    "aten::pow": "Pow",
}


def _operands(g: Translator, node: fx.Node, *operands: Any) -> list[Value]:
    """Convert operands to the dtype of a node's result, and combine weights at its rank."""
    dtype, rank = g.dtype(node), len(shape(node))
    return [g.tensor(v, dtype, rank) for v in operands]


# the logical operators of arithmetic on booleans
_BOOLEAN = {"Add": "Or", "Mul": "And", "Max": "Or", "Min": "And"}


@lowering(TARGET, *_BINARY)
def binary(g: Translator, node: fx.Node, a: Any, b: Any, alpha: Any = 1) -> Any:
    """Combine two operands, in the dtype of the result."""
    name = op_name(node.target)
    kind = _BINARY.get(name) or _BINARY[without_overload(name)]
    if isinstance(a, Complex) or isinstance(b, Complex):
        return complex_binary(g, node, kind, a, b)
    dtype = g.dtype(node)
    if dtype == torch.bool:
        return g.op(_BOOLEAN[kind], *_operands(g, node, a, b))
    if kind in ("Mul", "Add") and b == (1 if kind == "Mul" else 0) and isinstance(a, Value):
        return g.cast(a, dtype)
    left, right = _operands(g, node, a, b)
    right = _times(g, right, alpha)
    scaled = isinstance(a, Value) and not isinstance(b, Value | Parameter | Size)
    return repeated(g.op(kind, left, right), scaled and left.repeated)


@lowering(TARGET, "aten::rsub.Scalar", "aten::rsub.Tensor")
def rsub(g: Translator, node: fx.Node, a: Any, b: Any, alpha: Any = 1) -> Value:
    """Compute b - alpha * a."""
    (left,) = _operands(g, node, a)
    left = _times(g, left, alpha)
    return g.op("Sub", *_operands(g, node, b), left)


@lowering(TARGET, "aten::floor_divide", "aten::div.Tensor_mode", "aten::div.Scalar_mode")
def divide_rounded(
    g: Translator, node: fx.Node, a: Any, b: Any, rounding_mode: str | None = "floor"
) -> Value:
    """Divide, and round down or towards zero."""
    left, right = _operands(g, node, a, b)
    if left.dtype.is_floating_point:
        made = g.op("Div", left, right)
        if rounding_mode is None:
            return made
        return g.op("Floor", made) if rounding_mode == "floor" else trunc(g, node, made)
    if rounding_mode == "floor":
        # Div of integers rounds towards zero; without the remainder, the quotient is exact
        left = g.op("Sub", left, g.op("Mod", left, right))
    return g.op("Div", left, right)


@lowering(TARGET, "aten::trunc.default")
def trunc(g: Translator, node: fx.Node, x: Any) -> Value:
    """Drop the fraction."""
    x = g.tensor(x)
    return g.op("Mul", g.op("Sign", x), g.op("Floor", g.op("Abs", x)))


@lowering(TARGET, *(f"aten::{n}.{t}" for n in ("remainder", "fmod") for t in ("Tensor", "Scalar")))
def remainder(g: Translator, node: fx.Node, a: Any, b: Any) -> Value:
    """Compute the remainder of a division, with the divisor's sign; in fmod the dividend's."""
    dtype, is_fmod = g.dtype(node), "fmod" in op_name(node.target)
    left, right = _operands(g, node, a, b)
    if not dtype.is_floating_point and not is_fmod:
        return g.op("Mod", left, right)
    made = g.op("Mod", left, right, fmod=1)
    if is_fmod:
        return made
    # Mod of floats has the sign of the dividend
    other = g.op("Less", g.op("Mul", made, right), g.number(0, dtype), dtype=torch.bool)
    return g.op("Where", other, g.op("Add", made, right), made, dtype=dtype)


@lowering(TARGET, "aten::addcmul.default", "aten::addcdiv.default")
def add_scaled(g: Translator, node: fx.Node, x: Any, a: Any, b: Any, *, value: Any = 1) -> Value:
    """Add the product or the quotient of two tensors to a third one."""
    kind = "Mul" if "mul" in op_name(node.target) else "Div"
    made = _times(g, g.op(kind, *_operands(g, node, a, b)), value)
    return g.op("Add", *_operands(g, node, x), made)


@lowering(TARGET, "aten::lerp.Scalar", "aten::lerp.Tensor")
def lerp(g: Translator, node: fx.Node, a: Any, b: Any, weight: Any) -> Value:
    """Interpolate linearly between two tensors."""
    dtype, rank = g.dtype(node), len(shape(node))
    left = g.tensor(a, dtype, rank)
    way = g.op("Sub", g.tensor(b, dtype, rank), left)
    return g.op("Add", left, g.op("Mul", way, g.tensor(weight, dtype, rank)))


_COMPARISONS = {
    "aten::gt": "Greater",
    "aten::greater": "Greater",
    "aten::ge": "GreaterOrEqual",
    "aten::greater_equal": "GreaterOrEqual",
    "aten::lt": "Less",
    "aten::less": "Less",
    "aten::le": "LessOrEqual",
    "aten::less_equal": "LessOrEqual",
}


@lowering(TARGET, *_COMPARISONS)
def compare(g: Translator, node: fx.Node, a: Any, b: Any) -> Value:
    """Compare the order of two operands in their common dtype."""
    left, right = together(g, a, b)
    if left.dtype == torch.bool:
        left, right = g.cast(left, INT), g.cast(right, INT)
    return g.op(_COMPARISONS[without_overload(op_name(node.target))], left, right, dtype=torch.bool)


@lowering(TARGET, "aten::eq", "aten::ne", "aten::not_equal")
def equal(g: Translator, node: fx.Node, a: Any, b: Any) -> Value:
    """Compare whether two operands are equal, in their common dtype, or whether they are not."""
    same = g.op("Equal", *together(g, a, b), dtype=torch.bool)
    return same if without_overload(op_name(node.target)) == "aten::eq" else g.op("Not", same)


def together(g: Translator, a: Any, b: Any) -> tuple[Value, Value]:
    """Convert two operands to one dtype.

    Numbers take the dtype of tensors, unless a float is combined with integers.
    """
    values = [v if isinstance(v, int | float) else g.tensor(v) for v in (a, b)]
    dtypes = [v.dtype for v in values if isinstance(v, Value)]
    dtype = dtypes[0] if len(dtypes) == 1 else torch.promote_types(*dtypes)
    if not dtype.is_floating_point and any(isinstance(v, float) for v in values):
        dtype = torch.float32
    left, right = (g.tensor(v, dtype) for v in values)
    return left, right


# operators for booleans, and bitwise ones for integers
_LOGIC = {
    "aten::logical_and": ("And", ""),
    "aten::logical_or": ("Or", ""),
    "aten::logical_xor": ("Xor", ""),
    "aten::logical_not": ("Not", ""),
    "aten::bitwise_and": ("And", "BitwiseAnd"),
    "aten::bitwise_or": ("Or", "BitwiseOr"),
    "aten::bitwise_xor": ("Xor", "BitwiseXor"),
    "aten::bitwise_not": ("Not", "BitwiseNot"),
    "aten::__and__": ("And", "BitwiseAnd"),
    "aten::__or__": ("Or", "BitwiseOr"),
}


@lowering(TARGET, *_LOGIC)
def logic(g: Translator, node: fx.Node, *operands: Any) -> Value:
    """Apply a logical operator to booleans, or a bitwise one to integers."""
    truth, bits = _LOGIC[without_overload(op_name(node.target))]
    kind = truth if g.dtype(node) == torch.bool else bits
    return g.op(kind, *_operands(g, node, *operands))


@lowering(TARGET, "aten::clamp", "aten::clip", "aten::clamp_min", "aten::clamp_max")
def clamp(
    g: Translator, node: fx.Node, x: Any, first: Any = None, second: Any = None, **bounds: Any
) -> Value:
    """Limit values to bounds on either side."""
    low = bounds.get("min", first)
    high = bounds.get("max", second)
    if "clamp_max" in op_name(node.target):
        low, high = None, first
    out = g.tensor(x, g.dtype(node))
    for kind, bound, nothing in (("Max", low, -math.inf), ("Min", high, math.inf)):
        if isinstance(bound, Varying):
            bound = replace(bound, values=tuple(nothing if v is None else v for v in bound.values))
        if bound is not None:
            out = g.op(kind, out, g.tensor(bound, out.dtype))
    return out


@lowering(TARGET, *(f"aten::where.{t}" for t in ("self", "Scalar", "ScalarSelf", "ScalarOther")))
def where(g: Translator, node: fx.Node, condition: Any, a: Any, b: Any) -> Value:
    """Select elements of `a` or of `b` by a condition."""
    sides = _operands(g, node, a, b)
    return g.op("Where", g.tensor(condition, torch.bool), *sides, dtype=g.dtype(node))


@lowering(TARGET, "aten::masked_fill.Scalar", "aten::masked_fill.Tensor")
def masked_fill(g: Translator, node: fx.Node, x: Any, mask: Any, value: Any) -> Value:
    """Replace elements by a number where a mask is true."""
    return where(g, node, mask, _finite(g, value, g.dtype(node)), x)


def _finite(g: Translator, value: Any, dtype: torch.dtype) -> Any:
    """Limit a finite number to the range of a narrower dtype than the Program's."""
    if isinstance(value, int | float) and dtype.is_floating_point and math.isfinite(value):
        bound = torch.finfo(dtype)
        return min(max(value, bound.min), bound.max)
    return value


@lowering(TARGET, "aten::to", "aten::_to_copy", "aten::type_as", "reroll::widen")
def to(g: Translator, node: fx.Node, x: Any, dtype: Any = None, *_: Any, **__: Any) -> Any:
    """Convert to the node's dtype in ONNX, which the tensor may have already."""
    return g.tensor(x, g.dtype(node))


# ops that leave the numbers as they are
_SAME = "clone contiguous dropout feature_dropout detach alias lift_fresh_copy positive"
_SAME += " resolve_conj resolve_neg"


@lowering(TARGET, *(f"aten::{name}" for name in _SAME.split()))
@by_parts
def same(g: Translator, node: fx.Node, x: Any, *_: Any, **__: Any) -> Value:
    """Return the tensor unchanged."""
    return g.tensor(x)


# ---- functions of one operand

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
    """Apply a function of one operand to each element."""
    x = g.tensor(x, g.dtype(node))
    return repeated(g.op(_UNARY[op_name(node.target)], x), x.repeated)


@lowering(TARGET, "aten::isnan.default", "aten::isinf.default")
def test(g: Translator, node: fx.Node, x: Any) -> Value:
    """Return which elements are NaN, or infinite."""
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
    """Replace NaN and infinities by numbers."""
    dtype = g.dtype(node)
    largest, out = torch.finfo(dtype).max, g.tensor(x, dtype)
    above, below = (
        g.op("IsInf", out, dtype=torch.bool, **{f"detect_{other}": 0})
        for other in ("negative", "positive")
    )
    for mark, value, default in (
        (g.op("IsNaN", out, dtype=torch.bool), nan, 0.0),
        (above, posinf, largest),
        (below, neginf, -largest),
    ):
        filled = g.number(default if value is None else value, dtype)
        out = g.op("Where", mark, filled, out, dtype=dtype)
    return out


@lowering(TARGET, "aten::square.default")
def square(g: Translator, node: fx.Node, x: Any) -> Value:
    """Compute x * x."""
    x = g.tensor(x, g.dtype(node))
    return g.op("Mul", x, x)


@lowering(TARGET, "aten::expm1.default")
def expm1(g: Translator, node: fx.Node, x: Any) -> Value:
    """Compute exp(x) - 1 as tanh(x / 2) (exp(x) + 1), without cancellation near zero."""
    dtype = g.dtype(node)
    x = g.tensor(x, dtype)
    half = g.op("Tanh", g.op("Mul", x, g.number(0.5, dtype)))
    return g.op("Mul", half, g.op("Add", g.op("Exp", x), g.number(1.0, dtype)))


@lowering(TARGET, "aten::log1p.default")
def log1p(g: Translator, node: fx.Node, x: Any) -> Value:
    """Compute log(1 + x), with a factor that corrects the rounding of 1 + x."""
    dtype = g.dtype(node)
    x, one = g.tensor(x, dtype), g.number(1.0, dtype)
    whole = g.op("Add", x, one)
    ratio = g.op("Div", x, g.op("Sub", whole, one))
    tiny = g.op("Equal", whole, one, dtype=torch.bool)
    return g.op("Where", tiny, x, g.op("Mul", g.op("Log", whole), ratio), dtype=dtype)


@lowering(TARGET, "aten::exp2.default", "aten::log2.default")
def base_two(g: Translator, node: fx.Node, x: Any) -> Value:
    """Compute powers of two or logarithms to base two."""
    dtype = g.dtype(node)
    x = g.tensor(x, dtype)
    if "exp" in op_name(node.target):
        return g.op("Pow", g.number(2.0, dtype), x)
    return g.op("Div", g.op("Log", x), g.number(math.log(2), dtype))


# coefficients of Giles, "Approximating the erfinv function" (2012), single precision, highest
# power first
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
    """Compute the inverse of erf by two polynomials: one for the centre, one for the tails."""
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
    """Evaluate a polynomial by Horner's rule; the coefficient of the highest power is first."""
    made = g.number(factors[0], x.dtype)
    for factor in factors[1:]:
        made = g.op("Add", g.op("Mul", made, x), g.number(factor, x.dtype))
    return made


@lowering(TARGET, "aten::rsqrt.default")
def rsqrt(g: Translator, node: fx.Node, x: Any) -> Value:
    """Compute 1 / sqrt(x)."""
    return g.op("Reciprocal", g.op("Sqrt", g.tensor(x)))


@lowering(TARGET, "aten::softplus.default")
def softplus(g: Translator, node: fx.Node, x: Any, beta: float = 1, threshold: float = 20) -> Value:
    """Compute log(1 + exp(beta x)) / beta.

    Torch returns x above the threshold, which differs by rounding only.
    """
    x = g.tensor(x)
    factor = g.number(beta, x.dtype)
    return g.op("Div", g.op("Softplus", g.op("Mul", x, factor)), factor)


@lowering(TARGET, "aten::log_sigmoid.default")
def log_sigmoid(g: Translator, node: fx.Node, x: Any) -> Value:
    """Compute -softplus(-x), which does not overflow."""
    return g.op("Neg", g.op("Softplus", g.op("Neg", g.tensor(x))))


@lowering(TARGET, "aten::silu.default")
def silu(g: Translator, node: fx.Node, x: Any) -> Value:
    """Compute x * sigmoid(x)."""
    x = g.tensor(x)
    return g.op("Mul", x, g.op("Sigmoid", x))


@lowering(TARGET, "aten::gelu.default")
def gelu(g: Translator, node: fx.Node, x: Any, approximate: str = "none") -> Value:
    """Compute gelu, exactly or by tanh."""
    return g.op("Gelu", g.tensor(x), approximate=approximate)


@lowering(TARGET, "aten::leaky_relu.default")
def leaky_relu(g: Translator, node: fx.Node, x: Any, slope: float = 0.01) -> Value:
    """Multiply elements below zero by a slope."""
    return g.op("LeakyRelu", g.tensor(x), alpha=slope)


@lowering(TARGET, "aten::elu.default")
def elu(
    g: Translator, node: fx.Node, x: Any, alpha: float = 1, scale: float = 1, input_scale: float = 1
) -> Value:
    """Compute an exponential below zero, and a line above."""
    x = g.tensor(x)
    low = g.op("Mul", expm1(g, node, _times(g, x, input_scale)), g.number(alpha, x.dtype))
    positive = g.op("Greater", x, g.number(0, x.dtype), dtype=torch.bool)
    return _times(g, g.op("Where", positive, x, low, dtype=x.dtype), scale)


def _times(g: Translator, x: Value, factor: float) -> Value:
    return x if factor == 1 else g.op("Mul", x, g.number(factor, x.dtype))


@lowering(TARGET, "aten::hardtanh.default", "aten::relu6.default", "aten::hardsigmoid.default")
def bounded(g: Translator, node: fx.Node, x: Any, low: float = -1.0, high: float = 1.0) -> Value:
    """Compute a linear function between two bounds."""
    x, name = g.tensor(x), op_name(node.target)
    if "hardsigmoid" in name:
        return g.op("HardSigmoid", x, alpha=1 / 6, beta=0.5)
    low, high = (0.0, 6.0) if "relu6" in name else (low, high)
    return g.op("Clip", x, g.number(low, x.dtype), g.number(high, x.dtype))
