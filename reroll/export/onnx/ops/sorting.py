"""Lower ATen operators that sort and count."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from reroll.errors import ExportError
from reroll.export.onnx.graph import TARGET, Value
from reroll.export.onnx.ops.aten import together
from reroll.rewrite.ir.lowerings import lowering, op_name
from reroll.rewrite.ir.matching import shape

if TYPE_CHECKING:
    from reroll.export.onnx.emit.translate import Translator

INT = torch.int64
# the name of top-k indices, which are a choice; those of a full sort are none
CHOSEN = "chosen"


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
