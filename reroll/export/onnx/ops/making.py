"""Lower sizes, and tensors that are made of numbers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from reroll.export.onnx.graph import TARGET, Value
from reroll.export.onnx.ops.arguments import Size, shape_of
from reroll.rewrite.ir.lowerings import lowering, op_name
from reroll.rewrite.ir.matching import shape

if TYPE_CHECKING:
    from reroll.export.onnx.emit.translate import Translator

INT = torch.int64


@lowering(TARGET, "aten::sym_size.int")
def sym_size(g: Translator, node: fx.Node, x: Any, dim: int) -> Any:
    """Return the size of a dimension."""
    return g.size(shape_of(node)[dim])


_SIZE_ARITHMETIC = {
    "operator.add": "Add",
    "operator.sub": "Sub",
    "operator.mul": "Mul",
    "operator.floordiv": "Div",
    "operator.mod": "Mod",
    "torch.sym_max": "Max",
    "torch.sym_min": "Min",
}


@lowering(TARGET, *_SIZE_ARITHMETIC)
def size_arithmetic(g: Translator, node: fx.Node, a: Any, b: Any) -> Any:
    """Compute with sizes."""
    kind = _SIZE_ARITHMETIC[op_name(node.target)]
    left, right = g.shape([a]), g.shape([b])
    if kind == "Div":
        # Div rounds towards zero; without the remainder, the quotient is exact
        left = g.op("Sub", left, g.op("Mod", left, right))
    return Size(g, g.op(kind, left, right))


@lowering(TARGET, "aten::item.default", "aten::_local_scalar_dense.default")
def item(g: Translator, node: fx.Node, x: Any) -> Any:
    """Return the only element of a tensor as a number; integers can be used as sizes."""
    x = g.tensor(x)
    if x.dtype.is_floating_point:
        return g.op("Reshape", x, g.shape([]))
    return Size(g, g.op("Reshape", g.cast(x, INT), g.ints(1)))


@lowering(TARGET, "operator.neg")
def negative_size(g: Translator, node: fx.Node, a: Any) -> Any:
    """Negate a size, as in rounding up."""
    return Size(g, g.op("Neg", g.shape([a])))


@lowering(TARGET, "aten::arange.default", "aten::arange.start", "aten::arange.start_step")
def arange(g: Translator, node: fx.Node, *bounds: Any, **_: Any) -> Value:
    """Return numbers from start (default 0) to before the end, by steps (default 1)."""
    start, end, step = 0, bounds[0], 1
    if len(bounds) > 1:
        start, end = bounds[:2]
    if len(bounds) > 2:
        step = bounds[2]
    whole = all(not isinstance(v, float) or v.is_integer() for v in (start, end, step))
    kind = INT if whole else torch.float32
    ends = [int(v) if whole and isinstance(v, float) else v for v in (start, end, step)]
    return g.cast(g.op("Range", *(g.tensor(v, kind) for v in ends)), g.dtype(node))


_FULL = {
    f"aten::{prefix}{name}{suffix}.default": value
    for name, value in {"full": None, "zeros": 0, "ones": 1, "empty": 0}.items()
    for prefix, suffix in (("", ""), ("", "_like"), ("new_", ""))
}
_FULL |= dict.fromkeys(("aten::fill.Scalar", "aten::scalar_tensor.default"))
# the contents of an empty tensor are arbitrary
_FULL["aten::empty.memory_format"] = 0


@lowering(TARGET, *_FULL)
def full(g: Translator, node: fx.Node, *args: Any, **_: Any) -> Value:
    """Fill a tensor of the result's shape with one value."""
    value: Any = _FULL[op_name(node.target)]
    dtype = g.dtype(node)
    if value is None:
        # the value is the last positional argument
        value = args[-1]
    if isinstance(value, Value | Size):
        filled = g.tensor(value, dtype)
    else:
        if dtype.is_floating_point and math.isfinite(value):
            bound = torch.finfo(dtype)
            value = min(max(value, bound.min), bound.max)
        filled = g.number(value, dtype)
    dims = shape(node)
    return g.op("Expand", filled, g.shape(dims)) if dims else filled
