"""Parts of mixers' lowerings: feature maps, normalisers, a running maximum."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from reroll.errors import ExportError
from reroll.export.onnx.graph import Value
from reroll.export.onnx.ops.recurrence import Tokens
from reroll.export.onnx.plan.states import features

if TYPE_CHECKING:
    from reroll.export.onnx.emit.translate import Translator

INT, BOOL, FLOAT = torch.int64, torch.bool, torch.float32
# larger than any size
END = 2**62


def let_go(g: Translator, decay: Value) -> Value:
    """Compute 1 - exp(g), the forgotten part of a state."""
    return g.op("Sub", g.number(1.0, FLOAT), g.op("Exp", decay))


def counted(g: Translator, x: Tokens) -> Tokens:
    """Append a column of ones to the values, in which weights add up."""
    one = g.number(1.0, FLOAT)
    v = g.op("Pad", x.v, g.ints(0, 0, 0, 0, 0, 0, 0, 1), one)
    return replace(x, v=v, d_v=x.d_v + 1)


def split_counted(g: Translator, out: Value, x: Tokens) -> tuple[Value, Value]:
    """Split the output of counted values: [batch, time, heads, d_v], and the sum of weights."""
    out = g.op("Reshape", out, g.ints(0, 0, x.heads, x.d_v + 1))
    values, weights = g.graph.ops(
        "Split", out, g.ints(x.d_v, 1), hints=("values", "weights"), axis=3
    )
    return values, weights


def grouped(g: Translator, x: Tokens, value: Value) -> Value:
    """Repeat [batch, kv_heads, time, d] for every query head."""
    groups = x.heads // x.kv_heads
    value = g.op("Expand", g.op("Unsqueeze", value, g.ints(2)), g.ints(1, 1, groups, 1, 1))
    return g.op("Reshape", value, g.shape(["b", x.heads, "s", -1]))


def running_maximum(g: Translator, x: Value) -> Value:
    """Compute the largest number so far at each token: [batch, kv_heads, time].

    ONNX has no such operator. Time is cut into pieces of about sqrt(time) tokens. The maximum is
    computed inside each piece, and then over the ends of earlier pieces.
    """
    new: Any = g.size("s")
    lowest = g.number(-math.inf, FLOAT)
    root = g.op("Sqrt", g.cast(new.value, FLOAT))
    size = g.cast(g.op("Ceil", root), INT)
    missing = g.op("Mod", g.op("Neg", new.value), size)
    x = g.op("Pad", x, g.op("Concat", g.ints(0, 0, 0, 0, 0), missing, axis=0), lowest)
    shape = g.op("Concat", g.ints(0, 0, -1), size, axis=0)
    x = g.op("Reshape", x, shape)

    def seen(count: Value, *, itself: bool) -> Value:
        # 0 where a row includes a column, else -inf: [count, count]
        end = g.op("Squeeze", count, g.ints(0))
        places = g.op("Range", g.number(0, INT), end, g.number(1, INT))
        rows, columns = (g.op("Unsqueeze", places, g.ints(axis)) for axis in (1, 0))
        before = g.op("LessOrEqual" if itself else "Less", columns, rows, dtype=BOOL)
        return g.op("Where", before, g.number(0.0, FLOAT), lowest, dtype=FLOAT)

    def highest(value: Value, mask: Value, axis: int) -> Value:
        pairs = g.op("Add", g.op("Unsqueeze", value, g.ints(axis)), mask)
        return g.op("ReduceMax", pairs, g.ints(-1), keepdims=0)

    inside = highest(x, seen(size, itself=True), 3)
    ends = g.op("Squeeze", g.op("Slice", inside, g.ints(-1), g.ints(END), g.ints(3)), g.ints(3))
    count = g.op("Shape", ends, start=2, end=3, dtype=INT)
    before = highest(ends, seen(count, itself=False), 2)
    out = g.op("Max", inside, g.op("Unsqueeze", before, g.ints(3)))
    return g.op("Slice", g.op("Reshape", out, g.ints(0, 0, -1)), g.ints(0), new.value, g.ints(2))


def unit_tokens(g: Translator, mixer: Any, x: Tokens) -> Tokens:
    """Normalise queries and keys to length one, if the mixer requires it."""
    return replace(x, q=unit(g, x.q), k=unit(g, x.k)) if mixer.unit_length else x


def unit(g: Translator, value: Value) -> Value:
    """Normalise vectors to length one, with a small floor under the length."""
    squares = g.op("ReduceSum", g.op("Mul", value, value), g.ints(-1), keepdims=1)
    return g.op("Div", value, g.op("Sqrt", g.op("Add", squares, g.number(1e-6, FLOAT))))


def with_features(g: Translator, mixer: Any, x: Tokens) -> Tokens:
    """Apply the mixer's feature map to queries and keys."""
    name = mixer.key_map
    if name == "none":
        return x
    q, k = (_feature_map(g, name, value, x.d_k) for value in (x.q, x.k))
    # the features of a zero key need not be zero
    k = k if x.writes is None else g.op("Mul", k, x.writes)
    return replace(x, q=q, k=k, d_k=features(mixer, x.d_k))


def _feature_map(g: Translator, name: str, x: Value, d_k: int) -> Value:
    """Apply a feature map of `reroll.mixers.feature_maps`."""
    one = g.number(1.0, FLOAT)
    if name == "elu":
        return g.op("Add", g.op("Elu", x), one)
    if name == "relu":
        return g.op("Relu", x)
    if name == "softmax":
        return g.op("Softmax", x, axis=-1)
    if name == "hedgehog":
        parts = [g.op("Softmax", v, axis=-1) for v in (x, g.op("Neg", x))]
        return g.op("Max", g.op("Concat", *parts, axis=-1), g.number(1e-12, FLOAT))
    if name == "taylor":
        x = g.op("Mul", x, g.number(d_k**-0.25, FLOAT))
        pairs = g.op("Mul", g.op("Unsqueeze", x, g.ints(4)), g.op("Unsqueeze", x, g.ints(3)))
        square = g.op("Reshape", pairs, g.ints(0, 0, 0, d_k * d_k))
        square = g.op("Mul", square, g.number(0.5**0.5, FLOAT))
        joined = g.op("Concat", x, square, axis=-1)
        return g.op("Pad", joined, g.ints(0, 0, 0, 1, 0, 0, 0, 0), one)
    raise ExportError(f"the feature map {name!r} has no lowering to ONNX")
