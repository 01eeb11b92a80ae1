"""Lower element-wise functions of one operand, and activations."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from reroll.export.onnx.graph import TARGET, Value
from reroll.export.onnx.ops.arguments import repeated
from reroll.rewrite.ir.lowerings import lowering, op_name

if TYPE_CHECKING:
    from reroll.export.onnx.emit.translate import Translator

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
