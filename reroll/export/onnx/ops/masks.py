"""Which keys a query sees, as `reroll.rewrite.ir.ops.mask` defines it.

Masks are additive, with the lowest finite value where nothing is to be seen: a row of left padding
then averages all values and stays finite, as the reference does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from reroll.errors import ExportError
from reroll.export.onnx.emit.translate import TARGET
from reroll.export.onnx.graph import Value
from reroll.export.onnx.plan.parameters import Varying
from reroll.rewrite.ir.lowerings import lowering

if TYPE_CHECKING:
    from reroll.export.onnx.emit.translate import Translator

INT, BOOL = torch.int64, torch.bool

# fp16 has no room for a score below its lowest value
LOWEST = {torch.float16: -3e4}


def additive(g: Translator, dtype: torch.dtype, keep: Value) -> Value:
    """0 where a query may see a key, else the lowest value."""
    lowest = LOWEST.get(dtype, torch.finfo(dtype).min)
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
    blocks: Any = None,
    offset: Any = None,
) -> Value | None:
    """Booleans [1 or batch, 1, time or 1, keys], as `reroll.rewrite.ir.ops.mask` defines them.

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
                near = g.op("Less", distance, reach(g, window), dtype=BOOL)
                tests.append(_both(g, near, before))
            else:
                distance = g.op("Abs", distance)
                tests.append(g.op("LessOrEqual", distance, reach(g, window), dtype=BOOL))
        if chunk is not None:
            tests.append(_both(g, _same_chunk(g, q, kv, chunk, padding), before))
        if prefix is not None and tests and (window is not None or chunk is not None):
            near = tests.pop() if len(tests) == 1 else g.op("And", *tests)
            tests = [g.op("Or", near, _both(g, _in_prefix(g, kv, prefix, padding), before))]
        if blocks is not None:
            near = tests.pop() if len(tests) == 1 else g.op("And", *tests)
            tests = [g.op("Or", near, _same_block(g, blocks, length, keys, offset))]
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
    made = g.dtype(node)
    keep = visible(g, length, keys, causal, window, chunk, padding, prefix, blocks, offset)
    shown = g.number(0.0, made) if keep is None else additive(g, made, keep)
    return g.op("Expand", shown, g.shape([batch, 1, length, keys]))


def reach(g: Translator, window: Any) -> Value:
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
    size = reach(g, chunk)
    if padding is not None:
        counts = g.op("CumSum", g.tensor(padding, INT), g.number(-1, INT))
        leading = g.op("Cast", g.op("Equal", counts, g.number(0, INT), dtype=BOOL), to=7, dtype=INT)
        first = g.op("ReduceSum", leading, g.ints(-1), keepdims=1)
        first = g.op("Unsqueeze", first, g.ints(1, 2))
        q, kv = g.op("Sub", q, first), g.op("Sub", kv, first)
    # floor division of what may be negative: the remainder has the divisor's sign
    places = [g.op("Div", g.op("Sub", v, g.op("Mod", v, size)), size) for v in (q, kv)]
    return g.op("Equal", *places, dtype=BOOL)


def _same_block(g: Translator, blocks: Any, length: Any, keys: Any, offset: Any) -> Value:
    """Whether query and key have one number of 0 or more: [batch, 1, time, keys].

    `blocks` [batch, tokens] are the last of the keys; those before them are in no block.
    """
    if offset is not None:
        raise ExportError("a mask over blocks whose queries are not the last keys has no lowering")
    blocks, axis, end = g.tensor(blocks, INT), g.ints(1), g.ints(2**62)
    given = g.op("Shape", blocks, start=1, end=2, dtype=INT)
    missing = g.op("Sub", g.shape([keys]), given)
    pads = g.op("Concat", g.ints(0), missing, g.ints(0, 0), axis=0)
    of_key = g.op("Pad", blocks, pads, g.number(-1, INT))
    of_query = g.op("Slice", of_key, g.op("Neg", g.shape([length])), end, axis)
    of_query = g.op("Unsqueeze", of_query, g.ints(1, 3))
    same = g.op("Equal", of_query, g.op("Unsqueeze", of_key, g.ints(1, 2)), dtype=BOOL)
    return g.op("And", same, g.op("GreaterOrEqual", of_query, g.number(0, INT), dtype=BOOL))
