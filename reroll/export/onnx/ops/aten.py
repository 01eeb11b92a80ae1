"""Lower ATen operators: arithmetic, comparisons, logic, selection and conversions."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from reroll.export.onnx.graph import TARGET, Value
from reroll.export.onnx.ops.arguments import Parameter, Size, Varying, repeated
from reroll.export.onnx.ops.complex_numbers import Complex, by_parts, complex_binary
from reroll.rewrite.ir.lowerings import lowering, op_name
from reroll.rewrite.ir.matching import shape

if TYPE_CHECKING:
    from reroll.export.onnx.emit.translate import Translator

INT = torch.int64

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


# the logical operators of arithmetic on booleans
_BOOLEAN = {"Add": "Or", "Mul": "And", "Max": "Or", "Min": "And"}


@lowering(TARGET, *_BINARY)
def binary(g: Translator, node: fx.Node, a: Any, b: Any, alpha: Any = 1) -> Any:
    """Combine two operands, in the dtype of the result."""
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
    """Compute b - alpha * a."""
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
    """Divide, and round down or towards zero."""
    dtype, rank = g.dtype(node), len(shape(node))
    left, right = g.tensor(a, dtype, rank), g.tensor(b, dtype, rank)
    if dtype.is_floating_point:
        made = g.op("Div", left, right)
        if rounding_mode is None:
            return made
        return g.op("Floor", made) if rounding_mode == "floor" else truncated(g, made)
    if rounding_mode == "floor":
        # Div of integers rounds towards zero; without the remainder, the quotient is exact
        left = g.op("Sub", left, g.op("Mod", left, right))
    return g.op("Div", left, right)


def truncated(g: Translator, x: Value) -> Value:
    """Drop the fraction."""
    return g.op("Mul", g.op("Sign", x), g.op("Floor", g.op("Abs", x)))


@lowering(TARGET, "aten::trunc.default")
def trunc(g: Translator, node: fx.Node, x: Any) -> Value:
    """Drop the fraction."""
    return truncated(g, g.tensor(x))


@lowering(TARGET, "aten::remainder.Tensor", "aten::remainder.Scalar")
def remainder(g: Translator, node: fx.Node, a: Any, b: Any) -> Value:
    """Compute the remainder of a division, with the sign of the divisor."""
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
    """Compute the remainder of a division, with the sign of the dividend."""
    dtype, rank = g.dtype(node), len(shape(node))
    return g.op("Mod", g.tensor(a, dtype, rank), g.tensor(b, dtype, rank), fmod=1)


@lowering(TARGET, "aten::addcmul.default", "aten::addcdiv.default")
def add_scaled(g: Translator, node: fx.Node, x: Any, a: Any, b: Any, *, value: Any = 1) -> Value:
    """Add the product or the quotient of two tensors to a third one."""
    dtype, rank = g.dtype(node), len(shape(node))
    kind = "Mul" if "mul" in op_name(node.target) else "Div"
    made = g.op(kind, g.tensor(a, dtype, rank), g.tensor(b, dtype, rank))
    if value != 1:
        made = g.op("Mul", made, g.number(value, dtype))
    return g.op("Add", g.tensor(x, dtype, rank), made)


@lowering(TARGET, "aten::lerp.Scalar", "aten::lerp.Tensor")
def lerp(g: Translator, node: fx.Node, a: Any, b: Any, weight: Any) -> Value:
    """Interpolate linearly between two tensors."""
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
    """Compare two operands in their common dtype."""
    left, right = together(g, a, b)
    kind = _COMPARISONS.get(op_name(node.target))
    if kind is not None:
        if kind != "Equal" and left.dtype == torch.bool:
            left, right = g.cast(left, INT), g.cast(right, INT)
        return g.op(kind, left, right, dtype=torch.bool)
    return g.op("Not", g.op("Equal", left, right, dtype=torch.bool))


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
    """Apply a logical operator to booleans, or a bitwise one to integers."""
    dtype, rank = g.dtype(node), len(shape(node))
    truth, bits = _LOGIC[op_name(node.target)]
    kind = truth if dtype == torch.bool else bits
    return g.op(kind, *(g.tensor(v, dtype, rank) for v in operands))


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


@lowering(
    TARGET,
    "aten::where.self",
    "aten::where.Scalar",
    "aten::where.ScalarSelf",
    "aten::where.ScalarOther",
)
def where(g: Translator, node: fx.Node, condition: Any, a: Any, b: Any) -> Value:
    """Select elements of `a` or of `b` by a condition."""
    dtype, rank = g.dtype(node), len(shape(node))
    sides = g.tensor(a, dtype, rank), g.tensor(b, dtype, rank)
    return g.op("Where", g.tensor(condition, torch.bool), *sides, dtype=dtype)


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


@lowering(
    TARGET,
    "aten::to.dtype",
    "aten::to.other",
    "aten::to.device",
    "aten::to.dtype_layout",
    "aten::_to_copy.default",
    "aten::type_as.default",
    "reroll::widen.default",
)
def to(g: Translator, node: fx.Node, x: Any, dtype: Any = None, *_: Any, **__: Any) -> Any:
    """Convert to the node's dtype in ONNX, which the tensor may have already."""
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
    """Return the tensor unchanged."""
    return g.tensor(x)
