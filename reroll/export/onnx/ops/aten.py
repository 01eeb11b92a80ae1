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


# the logical operators of arithmetic on booleans
_BOOLEAN = {"Add": "Or", "Mul": "And", "Max": "Or", "Min": "And"}


@lowering(TARGET, *_BINARY)
def binary(g: Translator, node: fx.Node, a: Any, b: Any, alpha: Any = 1) -> Any:
    """Combine two operands, in the dtype of the result."""
    name = op_name(node.target)
    kind = _BINARY.get(name) or _BINARY[without_overload(name)]
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


@lowering(TARGET, "aten::floor_divide", "aten::div.Tensor_mode", "aten::div.Scalar_mode")
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
    dtype, rank = g.dtype(node), len(shape(node))
    truth, bits = _LOGIC[without_overload(op_name(node.target))]
    kind = truth if dtype == torch.bool else bits
    return g.op(kind, *(g.tensor(v, dtype, rank) for v in operands))


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
