"""Attention masks by `reroll.rewrite.ir.visibility`.

Masks are additive, with the lowest finite value where a key is hidden. A query of left padding then
averages all values and stays finite, as in the reference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from reroll.errors import ExportError
from reroll.export.onnx.graph import TARGET, Value
from reroll.export.onnx.ops.arguments import Varying
from reroll.rewrite.ir.lowerings import lowering
from reroll.rewrite.ir.matching import bind
from reroll.rewrite.ir.ops import MASK
from reroll.rewrite.ir.visibility import Visibility

if TYPE_CHECKING:
    from reroll.export.onnx.emit.translate import Translator

INT, BOOL = torch.int64, torch.bool

# for fp16, a value that leaves room for the score that is added
LOWEST = {torch.float16: -3e4}


def additive(g: Translator, dtype: torch.dtype, keep: Value) -> Value:
    """Return 0 where a query may see a key, else the lowest value."""
    lowest = LOWEST.get(dtype, torch.finfo(dtype).min)
    return g.op("Where", keep, g.number(0.0, dtype), g.number(lowest, dtype), dtype=dtype)


def visible(
    g: Translator, limits: Visibility, length: Any, keys: Any, offset: Any = None
) -> Value | None:
    """Compute `Visibility.seen` in ONNX: booleans [1 or batch, 1, time or 1, keys].

    Returns None if nothing is hidden. The queries are the last tokens of the keys, or begin at
    `offset`.
    """
    if isinstance(limits.causal, Varying):
        raise ExportError(
            "causality that differs from trip to trip cannot be in an ONNX Loop",
            hint="export with --graphs unrolled",
        )
    keep = _near(g, limits, length, keys, offset)
    if keep is not None and limits.blocks is not None:
        keep = g.op("Or", keep, _same_block(g, limits.blocks, length, keys, offset))
    if limits.padding is not None:
        padding = g.tensor(limits.padding, BOOL)
        keep = _both(g, g.op("Unsqueeze", padding, g.ints(1, 2)), keep)
    return keep


def _near(g: Translator, limits: Visibility, length: Any, keys: Any, offset: Any) -> Value | None:
    """Compute `Visibility.near`: causality, window, chunk and prefix; None if nothing is hidden."""
    window, chunk = limits.window, limits.chunk
    if not limits.causal and window is None and chunk is None:
        return None
    q, kv = _positions(g, length, keys, offset)
    before = g.op("LessOrEqual", kv, q, dtype=BOOL) if limits.causal else None
    if window is None and chunk is None:
        return before
    keep: Value | None = None
    if window is not None:
        distance, size = g.op("Sub", q, kv), reach(g, window)
        if limits.causal:
            keep = _both(g, g.op("Less", distance, size, dtype=BOOL), before)
        else:
            keep = g.op("LessOrEqual", g.op("Abs", distance), size, dtype=BOOL)
    if chunk is not None:
        keep = _both(g, _both(g, _same_chunk(g, q, kv, chunk, limits.padding), before), keep)
    if limits.prefix is not None:
        first = _in_prefix(g, kv, limits.prefix, limits.padding)
        keep = g.op("Or", keep, _both(g, first, before))
    return keep


def _positions(g: Translator, length: Any, keys: Any, offset: Any) -> tuple[Value, Value]:
    """Return the positions of queries [1, 1, time, 1] and keys [1, 1, 1, keys]."""
    rows, columns = (g.op("Squeeze", g.shape([n]), g.ints(0)) for n in (length, keys))
    zero, one = g.number(0, INT), g.number(1, INT)
    if offset is None:
        q = g.op("Range", g.op("Sub", columns, rows), columns, one)
    else:
        first = g.tensor(offset, INT)
        q = g.op("Range", first, g.op("Add", first, rows), one)
    kv = g.op("Range", zero, columns, one)
    return g.op("Unsqueeze", q, g.ints(0, 1, 3)), g.op("Unsqueeze", kv, g.ints(0, 1, 2))


@lowering(TARGET, "reroll::mask.default")
def mask(g: Translator, node: fx.Node, *args: Any, **kwargs: Any) -> Value:
    """Return the additive mask, where a Program adds it to its scores itself."""
    given, made = bind(MASK, args, kwargs), g.dtype(node)
    length, keys = given["q_length"], given["kv_length"]
    keep = visible(g, Visibility.among(given), length, keys, given["q_offset"])
    shown = g.number(0.0, made) if keep is None else additive(g, made, keep)
    return g.op("Expand", shown, g.shape([given["batch"], 1, length, keys]))


def reach(g: Translator, window: Any) -> Value:
    """Return a window's size; for trips without one, a number larger than any distance."""
    if isinstance(window, Varying):
        sizes = tuple(2**62 if size is None else size for size in window.values)
        window = Varying(g, sizes, window.trip)
    return g.tensor(window, INT)


def _both(g: Translator, test: Value, other: Value | None) -> Value:
    return test if other is None else g.op("And", test, other)


def _in_prefix(g: Translator, kv: Value, prefix: Any, padding: Any) -> Value:
    """Return whether a key is among the first that are not padding: [1 or batch, 1, 1, keys]."""
    count = g.tensor(prefix, INT)
    if padding is None:
        return g.op("Less", kv, count, dtype=BOOL)
    number = g.op("CumSum", g.tensor(padding, INT), g.number(-1, INT))
    number = g.op("Unsqueeze", number, g.ints(1, 2))
    return g.op("LessOrEqual", number, count, dtype=BOOL)


def _same_chunk(g: Translator, q: Value, kv: Value, chunk: Any, padding: Any) -> Value:
    """Return whether query and key are in one chunk.

    Chunks count from the first token that is not padding.
    """
    size = reach(g, chunk)
    if padding is not None:
        counts = g.op("CumSum", g.tensor(padding, INT), g.number(-1, INT))
        leading = g.op("Cast", g.op("Equal", counts, g.number(0, INT), dtype=BOOL), to=7, dtype=INT)
        first = g.op("ReduceSum", leading, g.ints(-1), keepdims=1)
        first = g.op("Unsqueeze", first, g.ints(1, 2))
        q, kv = g.op("Sub", q, first), g.op("Sub", kv, first)
    # floor division of numbers that may be negative: Mod has the sign of the divisor
    places = [g.op("Div", g.op("Sub", v, g.op("Mod", v, size)), size) for v in (q, kv)]
    return g.op("Equal", *places, dtype=BOOL)


def _same_block(g: Translator, blocks: Any, length: Any, keys: Any, offset: Any) -> Value:
    """Return whether query and key have the same block number, 0 or more: [batch, 1, time, keys].

    `blocks` [batch, tokens] are for the last tokens of the keys; earlier ones are in no block.
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
