"""The lowering of attention: the Attention operator with a mask that is made once.

The mask is additive, with the lowest finite value where nothing is to be seen: a row of left
padding then averages all values and stays finite, as the reference in `reroll.rewrite.ops` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from reroll.errors import ExportError
from reroll.export.onnx import windows
from reroll.export.onnx.graph import Value
from reroll.export.onnx.parameters import Varying
from reroll.export.onnx.translate import TARGET
from reroll.rewrite.lowerings import lowering

if TYPE_CHECKING:
    from reroll.export.onnx.translate import Translator

INT, BOOL = torch.int64, torch.bool

# fp16 has no room for a score below its lowest value
_LOWEST = {torch.float16: -3e4}


@lowering(TARGET, "reroll::attention.default")
def attention(
    g: Translator,
    node: fx.Node,
    q: Any,
    k: Any,
    v: Any,
    scale: float,
    causal: Any = False,
    window: Any = None,
    chunk: Any = None,
    softcap: float | None = None,
    sinks: Any = None,
    bias: Any = None,
    padding: Any = None,
    blocks: Any = None,
    prefix: Any = None,
) -> Value:
    """Softmax attention; see `reroll.rewrite.ops.attention`. [batch, time, heads, v_head_dim]."""
    dtype = g.dtype(node)
    columns = g.tensor(k).columns
    q, k, v = (g.tensor(x, dtype) for x in (q, k, v))
    shapes: list[Any] = [arg.meta["type"].shape for arg in node.args[:3]]  # type: ignore[union-attr]
    length = shapes[0][2]
    keys = shapes[1][2]
    if blocks is not None:
        raise ExportError("attention over blocks has no lowering to ONNX")
    if causal and not prefix and window == 0:
        zero = g.number(0.0, dtype)
        return g.op("Expand", zero, g.shape(node.meta["type"].shape))
    mask: Value | None
    if columns is not None:
        keys = columns.count(g)
        padding = g.tensor(padding) if padding is not None else windows.padding_of(g)
        seen = windows.visible(g, columns, window, padding)
        mask = _additive(g, dtype, seen)
    else:
        mask = _mask(g, dtype, length, keys, causal, window, chunk, padding, prefix)
    if bias is not None:
        bias = _rank4(g, g.tensor(bias, dtype), _shape_of(node, "bias", 9))
        mask = bias if mask is None else g.op("Add", bias, mask)
    if sinks is None and softcap is None:
        if mask is not None:
            mask = g.op("Expand", mask, g.shape([1, 1, length, keys]))
        made = g.op("Attention", q, k, v, mask, scale=scale)
    else:
        made = _explicit(g, q, k, v, scale, mask, softcap, sinks, shapes)
    made = g.op("Transpose", made, perm=[0, 2, 1, 3])
    if causal and not prefix and isinstance(window, Varying) and 0 in window.values:
        sees = g.op("Greater", _reach(g, window), g.number(0, INT), dtype=BOOL)
        made = g.op("Where", sees, made, g.number(0.0, dtype), dtype=dtype)
    return made


def _shape_of(node: fx.Node, name: str, position: int) -> Any:
    value: Any = node.kwargs.get(name) or node.args[position]
    return value.meta["type"].shape


def _rank4(g: Translator, value: Value, shape: Any) -> Value:
    missing = 4 - len(shape)
    return g.op("Unsqueeze", value, g.ints(*range(missing))) if missing else value


def _mask(
    g: Translator,
    dtype: torch.dtype,
    length: Any,
    keys: Any,
    causal: Any,
    window: Any,
    chunk: Any,
    padding: Any,
    prefix: Any,
) -> Value | None:
    """0 where a query may see a key, else the lowest value; None if every query sees every key."""
    keep = visible(g, length, keys, causal, window, chunk, padding, prefix)
    if keep is None:
        return None
    return _additive(g, dtype, keep)


def _additive(g: Translator, dtype: torch.dtype, keep: Value) -> Value:
    lowest = _LOWEST.get(dtype, torch.finfo(dtype).min)
    return g.op("Where", keep, g.number(0.0, dtype), g.number(lowest, dtype), dtype=dtype)


def visible(
    g: Translator,
    length: Any,
    keys: Any,
    causal: Any,
    window: Any,
    chunk: Any,
    padding: Any,
    prefix: Any = None,
    offset: Any = None,
) -> Value | None:
    """Booleans [1 or batch, 1, time or 1, keys], as `reroll.rewrite.ops.mask` defines them.

    The queries stand at the end of the keys, or from `offset`.
    """
    tests: list[Value] = []
    if isinstance(causal, Varying):
        raise ExportError(
            "causality that differs from trip to trip has no Loop",
            hint="export with --graphs unrolled",
        )
    if causal or window is not None or chunk is not None:
        rows, columns = g.shape([length]), g.shape([keys])
        zero, one = g.number(0, INT), g.number(1, INT)
        ends = [g.op("Squeeze", v, g.ints(0)) for v in (rows, columns)]
        if offset is None:
            q = g.op("Range", g.op("Sub", ends[1], ends[0]), ends[1], one)
        else:
            first = g.tensor(offset, INT)
            q = g.op("Range", first, g.op("Add", first, ends[0]), one)
        q = g.op("Unsqueeze", q, g.ints(0, 1, 3))
        kv = g.op("Unsqueeze", g.op("Range", zero, ends[1], one), g.ints(0, 1, 2))
        before = g.op("LessOrEqual", kv, q, dtype=BOOL) if causal else None
        if before is not None and window is None and chunk is None:
            tests.append(before)
        if window is not None:
            distance = g.op("Sub", q, kv)
            if causal:
                near = g.op("Less", distance, _reach(g, window), dtype=BOOL)
                tests.append(_both(g, near, before))
            else:
                distance = g.op("Abs", distance)
                tests.append(g.op("LessOrEqual", distance, _reach(g, window), dtype=BOOL))
        if chunk is not None:
            tests.append(_both(g, _same_chunk(g, q, kv, chunk, padding), before))
        if prefix is not None and tests and (window is not None or chunk is not None):
            near = tests.pop() if len(tests) == 1 else g.op("And", *tests)
            tests = [g.op("Or", near, _both(g, _in_prefix(g, kv, prefix, padding), before))]
    if padding is not None:
        padding = g.tensor(padding, BOOL)
        tests.append(g.op("Unsqueeze", padding, g.ints(1, 2)))
    keep: Value | None = None
    for test in tests:
        keep = _both(g, test, keep)
    return keep


@lowering(TARGET, "reroll::mask.default")
def mask(
    g: Translator,
    node: fx.Node,
    padding: Any,
    batch: Any,
    length: Any,
    keys: Any,
    offset: Any,
    causal: bool,
    window: Any,
    chunk: Any,
    blocks: Any,
    dtype: Any,
    prefix: Any = None,
) -> Value:
    """The additive mask, where a Program adds it to its scores itself."""
    if blocks is not None:
        raise ExportError("attention over blocks has no lowering to ONNX")
    made = g.dtype(node)
    lowest = _LOWEST.get(made, torch.finfo(made).min)
    keep = visible(g, length, keys, causal, window, chunk, padding, prefix, offset)
    shown = g.number(0.0, made)
    if keep is not None:
        shown = g.op("Where", keep, shown, g.number(lowest, made), dtype=made)
    return g.op("Expand", shown, g.shape([batch, 1, length, keys]))


def _reach(g: Translator, window: Any) -> Value:
    """A window's size; trips without one see everything."""
    if isinstance(window, Varying):
        sizes = tuple(2**62 if size is None else size for size in window.values)
        window = Varying(g, sizes, window.trip)
    return g.tensor(window, INT)


def _both(g: Translator, test: Value, other: Value | None) -> Value:
    return test if other is None else g.op("And", test, other)


def _in_prefix(g: Translator, kv: Value, prefix: Any, padding: Any) -> Value:
    """Whether a key is among the first that are not padding: [1 or batch, 1, 1, keys]."""
    count = g.tensor(prefix, INT)
    if padding is None:
        return g.op("Less", kv, count, dtype=BOOL)
    number = g.op("CumSum", g.tensor(padding, INT), g.number(-1, INT))
    number = g.op("Unsqueeze", number, g.ints(1, 2))
    return g.op("LessOrEqual", number, count, dtype=BOOL)


def _same_chunk(g: Translator, q: Value, kv: Value, chunk: Any, padding: Any) -> Value:
    """Whether query and key lie in one chunk, counted from the first token that is no padding."""
    size = _reach(g, chunk)
    if padding is not None:
        counts = g.op("CumSum", g.tensor(padding, INT), g.number(-1, INT))
        leading = g.op("Cast", g.op("Equal", counts, g.number(0, INT), dtype=BOOL), to=7, dtype=INT)
        first = g.op("ReduceSum", leading, g.ints(-1), keepdims=1)
        first = g.op("Unsqueeze", first, g.ints(1, 2))
        q, kv = g.op("Sub", q, first), g.op("Sub", kv, first)
    # floor division of what may be negative: the remainder has the divisor's sign
    places = [g.op("Div", g.op("Sub", v, g.op("Mod", v, size)), size) for v in (q, kv)]
    return g.op("Equal", *places, dtype=BOOL)


def _explicit(
    g: Translator,
    q: Value,
    k: Value,
    v: Value,
    scale: float,
    mask: Value | None,
    softcap: float | None,
    sinks: Any,
    shapes: list[Any],
) -> Value:
    """Scores written out, for what the operator does not know. [batch, heads, time, v_head_dim]."""
    heads, kv_heads = shapes[0][1], shapes[1][1]
    if heads != kv_heads:
        k, v = (_repeat(g, x, s, heads) for x, s in ((k, shapes[1]), (v, shapes[2])))
    scores = g.op("MatMul", q, g.op("Transpose", k, perm=[0, 1, 3, 2]))
    scores = g.op("Mul", scores, g.number(scale, q.dtype))
    if softcap is not None:
        bound = g.number(softcap, q.dtype)
        scores = g.op("Mul", g.op("Tanh", g.op("Div", scores, bound)), bound)
    if mask is not None:
        scores = g.op("Add", scores, mask)
    if sinks is None:
        return g.op("MatMul", g.op("Softmax", scores, axis=-1), v)
    column = g.op("Reshape", g.tensor(sinks, q.dtype), g.ints(1, heads, 1, 1))
    column = g.op("Expand", column, g.shape([shapes[0][0], heads, shapes[0][2], 1]))
    weights = g.op("Softmax", g.op("Concat", scores, column, axis=-1), axis=-1)
    weights = g.op("Slice", weights, g.ints(0), g.ints(-1), g.ints(-1), g.ints(1))
    return g.op("MatMul", weights, v)


def _repeat(g: Translator, x: Value, shape: Any, heads: int) -> Value:
    """Every KV head for each of its queries' heads."""
    batch, kv_heads, keys, width = shape
    groups = heads // kv_heads
    x = g.op("Unsqueeze", x, g.ints(2))
    x = g.op("Expand", x, g.ints(1, 1, groups, 1, 1))
    return g.op("Reshape", x, g.shape([batch, heads, keys, width]))
