"""Attention over a window and the first tokens, with caches of constant size.

New tokens see three groups of columns, in this order. These are the first tokens that have left the
window (`prefix`), the last `window - 1` tokens before the new ones, and the new ones.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import fx

from reroll.errors import ExportError
from reroll.export.onnx.graph import Value
from reroll.export.onnx.ops.arguments import Size
from reroll.export.onnx.plan.states import Ring

if TYPE_CHECKING:
    from reroll.export.onnx.emit.translate import Translator

INT, BOOL, FLOAT = torch.int64, torch.bool, torch.float32


def count(g: Translator, columns: Ring) -> Size:
    """Return the number of columns of keys."""
    new = g.size("s")
    assert isinstance(new, Size)
    return Size(g, g.op("Add", new.value, g.ints(columns.first + columns.held)))


def append(g: Translator, node: fx.Node, k: Value, v: Value) -> tuple[Value, Value]:
    """Update the caches with new keys and values, and return those of all columns."""
    states = g.states
    numbers = states.of(g, node)
    columns = states.ring(numbers[0])
    assert columns is not None
    made = []
    for part, new in (("key", k), ("value", v)):
        new = g.cast(new, g.settings.dtype)
        shown = [new]
        if columns.held:
            past = states.read(g, numbers, part)
            joined = g.op("Concat", past, new, axis=2, hint=part)
            kept = g.op("Slice", joined, g.ints(-columns.held), g.ints(2**62), g.ints(2))
            states.write(g, numbers, part, kept)
            shown = [joined]
        if columns.first:
            label = f"first_{part}"
            first = states.read(g, numbers, label)
            here = g.cast(_places(g, columns.first), new.dtype)
            # each first token is added once, to zeros
            states.write(g, numbers, label, g.op("Add", first, g.op("MatMul", here, new)))
            shown = [first, *shown]
        value = g.op("Concat", *shown, axis=2) if len(shown) > 1 else shown[0]
        made.append(replace(value, columns=columns))
    return made[0], made[1]


def visible(g: Translator, columns: Ring, window: int, padding: Value) -> Value:
    """Return which columns a new token sees: [batch, 1, time, columns].

    `padding` is over all tokens.
    """
    new = g.size("s")
    assert isinstance(new, Size)
    tail = g.op("Neg", g.op("Add", new.value, g.ints(columns.held)))
    end, axis = g.ints(2**62), g.ints(1)
    pads = g.ints(0, columns.held, 0, 0)

    def last(x: Value) -> Value:
        return g.op("Slice", g.op("Pad", x, pads, g.number(0, x.dtype)), tail, end, axis)

    counted = g.cast(padding, INT)
    number = g.op("CumSum", counted, g.number(-1, INT))
    seen = g.op("Greater", last(counted), g.number(0, INT), dtype=BOOL)
    # positions count from the first held column; the new tokens follow
    length = g.op("Squeeze", new.value, g.ints(0))
    held = g.number(columns.held, INT)
    total, one = g.op("Add", length, held), g.number(1, INT)
    places = g.op("Range", g.number(0, INT), total, one)
    rows = g.op("Unsqueeze", g.op("Range", held, total, one), g.ints(0, 1, 3))
    places = g.op("Unsqueeze", places, g.ints(0, 1, 2))
    near = g.op("Less", g.op("Sub", rows, places), g.number(window, INT), dtype=BOOL)
    if columns.first:
        early = g.op("LessOrEqual", last(number), g.number(columns.first, INT), dtype=BOOL)
        near = g.op("Or", near, g.op("Unsqueeze", early, g.ints(1, 2)))
    near = g.op("And", near, g.op("LessOrEqual", places, rows, dtype=BOOL))
    near = g.op("And", near, g.op("Unsqueeze", seen, g.ints(1, 2)))
    if not columns.first:
        return near
    # the number of tokens that have left the window, which is that of filled first columns
    gone = g.op("Slice", counted, g.ints(0), tail, axis)
    gone = g.op("ReduceSum", gone, axis, keepdims=1)
    slots = g.op("Less", g.number([list(range(columns.first))], INT), gone, dtype=BOOL)
    slots = g.op("Unsqueeze", slots, g.ints(1, 2))
    batch = g.shape(["b", 1, "s", columns.first])
    return g.op("Concat", g.op("Expand", slots, batch), near, axis=3)


def _places(g: Translator, first: int) -> Value:
    """Return 1.0 where a new token is one of the first of its row: [batch, 1, first, time]."""
    padding = padding_of(g)
    new = g.size("s")
    assert isinstance(new, Size)
    counted = g.cast(padding, INT)
    # zero at padding, else the number of the token in its row, from one
    number = g.op("Mul", g.op("CumSum", counted, g.number(-1, INT)), counted)
    tail = g.op("Neg", new.value)
    number = g.op("Slice", number, tail, g.ints(2**62), g.ints(1))
    number = g.op("Unsqueeze", number, g.ints(1, 2))
    wanted = g.number([[[[i + 1] for i in range(first)]]], INT)
    return g.cast(g.op("Equal", number, wanted, dtype=BOOL), FLOAT)


def padding_of(g: Translator) -> Value:
    """Return the padding mask [batch, tokens] that the graph gets."""
    for item in g.program.inputs:
        if item.role == "padding" and len(item.type.shape) == 2 and item.type.dtype == INT:
            return Value(item.name, INT, g.graph.root)
    raise ExportError(
        "a window that does not grow needs a padding mask [batch, tokens] to count by",
        hint="capture the model with its attention_mask",
    )
