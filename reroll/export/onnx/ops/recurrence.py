"""Lower recurrences: which tokens are written, and when. The mathematics is in `mixers`.

A mixer without a core (`reroll.mixers.core`) can register a construction as "recurrence:NAME".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from reroll.errors import ExportError
from reroll.export.onnx.graph import TARGET, Value
from reroll.export.onnx.ops.arguments import Varying
from reroll.export.onnx.ops.states import NoStates
from reroll.export.onnx.ops.windows import padding_of
from reroll.export.onnx.plan.states import recurrence_parts
from reroll.mixers import Gate, make
from reroll.mixers.gates import varying, with_constant
from reroll.rewrite.ir.lowerings import find_lowering, lowering
from reroll.rewrite.ir.matching import bind
from reroll.rewrite.ir.ops import BIDIRECTIONAL, RECURRENCE

if TYPE_CHECKING:
    from reroll.export.onnx.emit.translate import Translator

INT, BOOL, FLOAT = torch.int64, torch.bool, torch.float32


@dataclass(frozen=True)
class Tokens:
    """Arguments of a mixer's construction: fp32, [batch, heads or kv_heads, time, ...]."""

    q: Value
    k: Value
    v: Value
    gates: tuple[Value, ...]
    # 1.0 where a token is written [batch, 1 or kv_heads, time, 1]; None if all are
    writes: Value | None
    heads: int
    kv_heads: int
    d_k: int
    d_v: int
    scale: float
    # whether the decay, which is the first gate, has a number for each channel of the key
    by_channel: bool


@lowering(TARGET, "reroll::recurrence.default")
def recurrence(g: Translator, node: fx.Node, *args: Any, **kwargs: Any) -> Value:
    """Lower a token mixer with its state; see `reroll.rewrite.ir.ops.recurrence`."""
    given = _given(RECURRENCE, args, kwargs)
    if not given["active"]:
        return g.op("Expand", g.number(0.0, g.dtype(node)), g.shape(node.meta["type"].shape))
    padding, skip = given["padding"], given["skip"]
    if skip and padding is None:
        padding = padding_of(g)
    writes = _writes(g, padding, skip, given["idle"])
    tensors = [g.tensor(x, FLOAT) for x in (*map(given.get, "qkv"), *given["gates"])]
    return g.cast(_mixed(g, node, given, tensors, writes, given["delay"]), g.dtype(node))


@lowering(TARGET, "reroll::bidirectional.default")
def bidirectional(g: Translator, node: fx.Node, *args: Any, **kwargs: Any) -> Value:
    """Lower a token mixer that runs in both directions, and keeps no state.

    See `reroll.rewrite.ir.ops.recurrence`.
    """
    given = _given(BIDIRECTIONAL, args, kwargs)
    if not given["active"]:
        return g.op("Expand", g.number(0.0, g.dtype(node)), g.shape(node.meta["type"].shape))
    tensors = [g.tensor(x, FLOAT) for x in (*map(given.get, "qkv"), *given["gates"])]
    padding, delay, skip = (given[name] for name in ("padding", "delay", "skip"))
    states, sizes = g.states, g.sizes
    ends = {
        name: g.op("Shape", tensors[0], start=i, end=i + 1, dtype=INT)
        for name, i in (("b", 0), ("s", 2))
    }
    # delayed by one token at least on the way back, so that a token reads its own write only once
    late = max(delay, 1)
    forwards, backwards = (NoStates(recurrence_parts(node, d)) for d in (delay, late))
    g.states, g.sizes = forwards, {**sizes, **ends}  # type: ignore[assignment]
    try:
        if skip and padding is None:
            padding = g.op("Expand", g.number(1, INT), g.shape(["b", "s"]))
        writes = _writes(g, padding, skip, None)
        forth = _mixed(g, node, given, tensors, writes, delay)
        tensors = [_reversed(g, x, 2) for x in tensors]
        writes = None if writes is None else _reversed(g, writes, 2)
        g.states = backwards  # type: ignore[assignment]
        back = _mixed(g, node, given, tensors, writes, late)
    finally:
        g.states, g.sizes = states, sizes
    return g.cast(g.op("Add", forth, _reversed(g, back, 1)), g.dtype(node))


def _given(op: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Return all arguments of an op; raise ExportError if what a Loop cannot express differs."""
    given = bind(op, args, kwargs)
    if any(isinstance(given[name], Varying) for name in ("delay", "skip", "active")):
        raise ExportError(
            "a recurrence that differs from trip to trip cannot be in an ONNX Loop",
            hint="export this model with --graphs unrolled",
        )
    return given


def _reversed(g: Translator, x: Value, axis: int) -> Value:
    """Reverse an axis."""
    return g.op("Slice", x, g.ints(-1), g.ints(-(2**62)), g.ints(axis), g.ints(-1))


def _mixed(
    g: Translator,
    node: fx.Node,
    given: dict[str, Any],
    tensors: list[Value],
    writes: Value | None,
    delay: int,
) -> Value:
    """Compute [batch, time, heads, d_v] in fp32, by the construction of the mixer."""
    rule = given["rule"]
    mixer = make(rule, given["options"])
    construction = find_lowering(TARGET, f"recurrence:{rule}")
    if construction is None and mixer.core is not None:
        construction = find_lowering(TARGET, "recurrence")
    if construction is None:
        raise ExportError(
            f"the mixer {rule} has no lowering to ONNX",
            hint=f'give it one: @lowering("onnx", "recurrence:{rule}")',
        )
    shapes: list[Any] = [a.meta["type"].shape for a in node.args[:3]]  # type: ignore[union-attr]
    heads, kv_heads, d_k, d_v = shapes[0][1], shapes[1][1], shapes[1][3], shapes[2][3]
    declared = mixer.gates(d_k, d_v)
    q, *later = tensors
    if delay:
        k, v, *gates = later
        waits, moved = varying(declared, declared), varying(declared, gates)
        (k, v, *moved), writes = _delayed(g, node, [k, v, *moved], writes, delay, waits, kv_heads)
        later = [k, v, *with_constant(declared, gates, moved)]
    k, v, *values = later
    if writes is not None:
        k = g.op("Mul", k, writes)
        values = [
            x if gate.constant else _neutral(g, x, writes, gate)
            for x, gate in zip(values, declared, strict=True)
        ]
    for place, gate in enumerate(declared):
        if gate.floor is not None:
            values[place] = g.op("Max", values[place], g.number(gate.floor, FLOAT))
    scale = mixer.default_scale(d_k) if mixer.scale is None else mixer.scale
    by_channel = bool(declared and declared[0].shape)
    tokens = Tokens(q, k, v, tuple(values), writes, heads, kv_heads, d_k, d_v, scale, by_channel)
    out = construction(g, node, mixer, tokens)
    return g.op("Reshape", out, g.ints(0, 0, heads, d_v))


def _writes(g: Translator, padding: Any, skip: int, idle: Any) -> Value | None:
    """Return 1.0 where a new token is written: [batch, 1, time, 1]; None if all are."""
    now: Value | None = None
    if padding is not None:
        counted = g.tensor(padding, INT)
        new: Any = g.size("s")
        if skip:
            number = g.op("CumSum", counted, g.number(-1, INT))
            past = g.cast(g.op("Greater", number, g.number(skip, INT), dtype=BOOL), INT)
            counted = g.op("Mul", past, counted)
        tail = g.op("Neg", new.value)
        now = g.cast(g.op("Slice", counted, tail, g.ints(2**62), g.ints(1)), FLOAT)
    if idle is not None:
        busy = g.cast(g.op("Not", g.tensor(idle, BOOL)), FLOAT)
        now = busy if now is None else g.op("Mul", now, busy)
    return None if now is None else g.op("Unsqueeze", now, g.ints(1, 3))


def _delayed(
    g: Translator,
    node: fx.Node,
    tensors: list[Value],
    writes: Value | None,
    delay: int,
    declared: Sequence[Gate],
    kv_heads: int,
) -> tuple[list[Value], Value]:
    """Return keys, values and gates of the tokens whose delay has passed, and their writes.

    The new ones are stored in the state.
    """
    sizes: list[Any] = [a.meta["type"].shape[-1] for a in node.args[1:3]]  # type: ignore[union-attr]
    sizes += [math.prod(gate.shape) for gate in declared] + [1]
    new: Any = g.size("s")
    if writes is None:
        writes = g.number([[[[1.0]]]], FLOAT)
    column = g.op("Expand", writes, g.shape(["b", kv_heads, "s", 1]))

    def shaped(gates: list[Value], shapes: list[tuple[int, ...]]) -> list[Value]:
        return [
            x if len(gate.shape) == 1 else g.op("Reshape", x, g.ints(0, 0, 0, *shape))
            for x, gate, shape in zip(gates, declared, shapes, strict=True)
        ]

    k, v, *gates = tensors
    packed = g.op("Concat", k, v, *shaped(gates, [(n,) for n in sizes[2:-1]]), column, axis=3)
    numbers = g.states.of(g, node)
    past = g.states.read(g, numbers, "waiting")
    held = g.op("Concat", past, packed, axis=2)
    axis = g.ints(2)
    g.states.write(g, numbers, "waiting", g.op("Slice", held, g.ints(-delay), g.ints(2**62), axis))
    due = g.op("Slice", held, g.ints(0), new.value, axis)
    hints = [f"due{i}" for i in range(len(sizes))]
    k, v, *gates, written = g.graph.ops("Split", due, g.ints(*sizes), hints=hints, axis=3)
    return [k, v, *shaped(gates, [gate.shape for gate in declared])], written


def _neutral(g: Translator, gate: Value, writes: Value, declared: Any) -> Value:
    """Replace a gate by its neutral value where a token is not written."""
    if not declared.shape:
        writes = g.op("Squeeze", writes, g.ints(3))
    elif len(declared.shape) > 1:
        writes = g.op("Unsqueeze", writes, g.ints(*range(4, 3 + len(declared.shape))))
    if declared.neutral == 0.0:
        return g.op("Mul", gate, writes)
    seen = g.op("Greater", writes, g.number(0.5, FLOAT), dtype=BOOL)
    return g.op("Where", seen, gate, g.number(declared.neutral, FLOAT))
