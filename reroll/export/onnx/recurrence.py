"""The lowering of recurrences: `LinearAttention`, with a function that says what it means.

Most mixers are one of the operator's update rules after what they do to each token; the others are
brought to one: a normaliser is a further column of values, and RWKV-6, which reads before it
writes, undoes the decay in its queries and takes the difference to its own write. A mixer that has
no construction here can register one under "recurrence:NAME".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from reroll.errors import ExportError
from reroll.export.onnx.graph import Value
from reroll.export.onnx.linear_attention import linear_attention
from reroll.export.onnx.parameters import Varying
from reroll.export.onnx.translate import TARGET
from reroll.export.onnx.windows import padding_of
from reroll.mixers import make
from reroll.rewrite.lowerings import find_lowering, lowering

if TYPE_CHECKING:
    from reroll.export.onnx.translate import Translator

INT, BOOL, FLOAT = torch.int64, torch.bool, torch.float32


@dataclass(frozen=True)
class Tokens:
    """What a mixer's construction gets: fp32, [batch, heads or kv_heads, time, ...]."""

    q: Value
    k: Value
    v: Value
    gates: tuple[Value, ...]
    # 1.0 where a token writes [batch, 1 or kv_heads, time, 1]; None if all do
    writes: Value | None
    heads: int
    kv_heads: int
    d_k: int
    d_v: int
    scale: float
    # whether the first gate, the decay, has a number for each channel of the key
    by_channel: bool


@lowering(TARGET, "reroll::recurrence.default")
def recurrence(
    g: Translator,
    node: fx.Node,
    q: Any,
    k: Any,
    v: Any,
    gates: Any,
    rule: str,
    options: str,
    padding: Any = None,
    delay: Any = 0,
    skip: Any = 0,
    active: Any = True,
) -> Value:
    """A token mixer on its state; see `reroll.rewrite.ops.recurrence`."""
    if any(isinstance(x, Varying) for x in (delay, skip, active)):
        raise ExportError(
            "a recurrence that differs from trip to trip has no Loop",
            hint="export this model with --graphs unrolled",
        )
    dims = node.meta["type"].shape
    if not active:
        return g.op("Expand", g.number(0.0, g.dtype(node)), g.shape(dims))
    construction = find_lowering(TARGET, f"recurrence:{rule}")
    if construction is None:
        raise ExportError(
            f"the mixer {rule} has no lowering to ONNX",
            hint=f'give it one: @lowering("onnx", "recurrence:{rule}")',
        )
    mixer = make(rule, options)
    shapes: list[Any] = [a.meta["type"].shape for a in node.args[:3]]  # type: ignore[union-attr]
    heads, kv_heads, d_k, d_v = shapes[0][1], shapes[1][1], shapes[1][3], shapes[2][3]
    q, k, v = (g.tensor(x, FLOAT) for x in (q, k, v))
    values = [g.tensor(x, FLOAT) for x in gates]
    writes = _writes(g, padding, skip)
    declared = mixer.gates(d_k, d_v)
    if delay:
        k, v, values, writes = _delayed(g, node, k, v, values, writes, delay, declared, kv_heads)
    if writes is not None:
        k = g.op("Mul", k, writes)
        values = [_neutral(g, x, writes, gate) for x, gate in zip(values, declared, strict=True)]
    for place, gate in enumerate(declared):
        if gate.floor is not None:
            values[place] = g.op("Max", values[place], g.number(gate.floor, FLOAT))
    scale = mixer.default_scale(d_k) if mixer.scale is None else mixer.scale
    tokens = Tokens(
        q,
        k,
        v,
        tuple(values),
        writes,
        heads,
        kv_heads,
        d_k,
        d_v,
        scale,
        bool(declared and declared[0].shape),
    )
    out = construction(g, node, mixer, tokens)
    made = g.op("Reshape", out, g.ints(0, 0, heads, d_v))
    return g.cast(made, g.dtype(node))


def _writes(g: Translator, padding: Any, skip: int) -> Value | None:
    """1.0 where a new token writes: [batch, 1, time, 1]."""
    if padding is None and not skip:
        return None
    counted = g.tensor(padding, INT) if padding is not None else padding_of(g)
    new: Any = g.size("s")
    tail = g.op("Neg", new.value)
    if skip:
        number = g.op("CumSum", counted, g.number(-1, INT))
        past = g.cast(g.op("Greater", number, g.number(skip, INT), dtype=BOOL), INT)
        counted = g.op("Mul", past, counted)
    now = g.op("Slice", counted, tail, g.ints(2**62), g.ints(1))
    return g.op("Unsqueeze", g.cast(now, FLOAT), g.ints(1, 3))


def _delayed(
    g: Translator,
    node: fx.Node,
    k: Value,
    v: Value,
    gates: list[Value],
    writes: Value | None,
    delay: int,
    declared: Any,
    kv_heads: int,
) -> tuple[Value, Value, list[Value], Value]:
    """The tokens whose turn it is; the new ones wait in the state."""
    sizes: list[Any] = [a.meta["type"].shape[-1] for a in node.args[1:3]]  # type: ignore[union-attr]
    sizes += [gate.shape[0] if gate.shape else 1 for gate in declared] + [1]
    if any(len(gate.shape) > 1 for gate in declared):
        raise ExportError("a gate with more than one dimension cannot wait")
    new: Any = g.size("s")
    if writes is None:
        writes = g.number([[[[1.0]]]], FLOAT)
    column = g.op("Expand", writes, g.shape(["b", kv_heads, "s", 1]))
    lifted = [
        x if gate.shape else g.op("Unsqueeze", x, g.ints(3))
        for x, gate in zip(gates, declared, strict=True)
    ]
    packed = g.op("Concat", k, v, *lifted, column, axis=3)
    numbers = g.states.of(g, node)
    dims = (kv_heads, delay, sum(sizes))
    past = g.states.read(g, numbers, "waiting", dims, FLOAT)
    held = g.op("Concat", past, packed, axis=2)
    axis = g.ints(2)
    g.states.write(g, numbers, "waiting", g.op("Slice", held, g.ints(-delay), g.ints(2**62), axis))
    due = g.op("Slice", held, g.ints(0), new.value, axis)
    hints = [f"due{i}" for i in range(len(sizes))]
    k, v, *rest = g.graph.ops("Split", due, g.ints(*sizes), hints=hints, axis=3)
    ready = [
        x if gate.shape else g.op("Squeeze", x, g.ints(3))
        for x, gate in zip(rest[:-1], declared, strict=True)
    ]
    return k, v, ready, rest[-1]


def _neutral(g: Translator, gate: Value, writes: Value, declared: Any) -> Value:
    """A gate that does nothing where a token does not write."""
    if not declared.shape:
        writes = g.op("Squeeze", writes, g.ints(3))
    if declared.neutral == 0.0:
        return g.op("Mul", gate, writes)
    seen = g.op("Greater", writes, g.number(0.5, FLOAT), dtype=BOOL)
    return g.op("Where", seen, gate, g.number(declared.neutral, FLOAT))


# ---- the mixers


@lowering(TARGET, "recurrence:retention", "recurrence:gla")
def gated(g: Translator, node: fx.Node, mixer: Any, x: Tokens) -> Value:
    """A decay for each head or channel, after a feature map."""
    q, k, d_k = _features(g, mixer, x)
    return linear_attention(g, node, x, q, k, x.v, d_k, x.d_v, "gated", decay=x.gates[0])


@lowering(TARGET, "recurrence:mamba2")
def mamba2(g: Translator, node: fx.Node, mixer: Any, x: Tokens) -> Value:
    """The step size scales the keys."""
    q, k, d_k = _features(g, mixer, x)
    k = g.op("Mul", k, g.op("Unsqueeze", x.gates[1], g.ints(3)))
    return linear_attention(g, node, x, q, k, x.v, d_k, x.d_v, "gated", decay=x.gates[0])


@lowering(TARGET, "recurrence:hgrn2")
def hgrn2(g: Translator, node: fx.Node, mixer: Any, x: Tokens) -> Value:
    """The key is what the decay lets go: 1 - exp(g)."""
    q, _, d_k = _features(g, mixer, x)
    k = g.op("Sub", g.number(1.0, FLOAT), g.op("Exp", x.gates[0]))
    return linear_attention(g, node, x, q, k, x.v, d_k, x.d_v, "gated", decay=x.gates[0])


@lowering(TARGET, "recurrence:linear")
def linear(g: Translator, node: fx.Node, mixer: Any, x: Tokens) -> Value:
    """The sum of weights is a further column of values, and of the state."""
    q, k, d_k = _features(g, mixer, x)
    one = g.op("Expand", g.number([[[[1.0]]]], FLOAT), g.shape(["b", x.kv_heads, "s", 1]))
    v = g.op("Concat", x.v, one, axis=3)
    out = linear_attention(g, node, x, q, k, v, d_k, x.d_v + 1, "linear")
    out = g.op("Reshape", out, g.ints(0, 0, x.heads, x.d_v + 1))
    values, weights = g.graph.ops(
        "Split", out, g.ints(x.d_v, 1), hints=("values", "weights"), axis=3
    )
    if not mixer.normalise:
        return values
    return g.op("Div", values, g.op("Max", weights, g.number(1e-6, FLOAT)))


@lowering(TARGET, "recurrence:deltanet")
def deltanet(g: Translator, node: fx.Node, mixer: Any, x: Tokens) -> Value:
    """The delta rule without decay."""
    q, k = _unit(g, mixer, x)
    return linear_attention(g, node, x, q, k, x.v, x.d_k, x.d_v, "delta", beta=x.gates[0])


@lowering(TARGET, "recurrence:gated_deltanet", "recurrence:kda")
def gated_delta(g: Translator, node: fx.Node, mixer: Any, x: Tokens) -> Value:
    """The delta rule on a state that fades by head or by channel."""
    q, k = _unit(g, mixer, x)
    decay, beta = x.gates
    return linear_attention(
        g, node, x, q, k, x.v, x.d_k, x.d_v, "gated_delta", decay=decay, beta=beta
    )


@lowering(TARGET, "recurrence:rwkv6")
def rwkv6(g: Translator, node: fx.Node, mixer: Any, x: Tokens) -> Value:
    """Read before write: queries undo their own token's decay, and the bonus makes good the rest.

    q S_{t-1} = q exp(-g) S_t - (q exp(-g) . k) v, where S_t = exp(g) S_{t-1} + k v^T.
    """
    q, k, d_k = _features(g, mixer, x)
    decay, bonus = x.gates
    undo = g.op("Exp", g.op("Neg", decay))
    groups = x.heads // x.kv_heads

    def grouped(value: Value) -> Value:
        # [batch, kv_heads, time, d] for every query head
        value = g.op("Expand", g.op("Unsqueeze", value, g.ints(2)), g.ints(1, 1, groups, 1, 1))
        return g.op("Reshape", value, g.shape(["b", x.heads, "s", -1]))

    before = g.op("Mul", q, grouped(undo))
    out = linear_attention(g, node, x, before, k, x.v, d_k, x.d_v, "gated", decay=decay)
    own = g.op("Mul", g.op("Mul", q, grouped(g.op("Sub", bonus, undo))), grouped(k))
    score = g.op("ReduceSum", own, g.ints(3), keepdims=1)
    if x.scale != 1.0:
        score = g.op("Mul", score, g.number(x.scale, FLOAT))
    extra = g.op("Transpose", g.op("Mul", score, grouped(x.v)), perm=[0, 2, 1, 3])
    return g.op("Add", out, g.op("Reshape", extra, g.ints(0, 0, x.heads * x.d_v)))


def _unit(g: Translator, mixer: Any, x: Tokens) -> tuple[Value, Value]:
    """Queries and keys of length one, if the mixer wants that."""
    if not mixer.unit_keys:
        return x.q, x.k

    def unit(value: Value) -> Value:
        squares = g.op("ReduceSum", g.op("Mul", value, value), g.ints(-1), keepdims=1)
        length = g.op("Sqrt", g.op("Add", squares, g.number(1e-6, FLOAT)))
        return g.op("Div", value, length)

    return unit(x.q), unit(x.k)


def _features(g: Translator, mixer: Any, x: Tokens) -> tuple[Value, Value, int]:
    """Queries and keys through the feature map, and how many channels they then have."""
    name = getattr(mixer, "feature_map", "none")
    if name == "none":
        return x.q, x.k, x.d_k
    q, k = (_feature_map(g, name, value, x.d_k) for value in (x.q, x.k))
    # features of a zero need not be zero
    return q, k if x.writes is None else g.op("Mul", k, x.writes), mixer.features(x.d_k)


def _feature_map(g: Translator, name: str, x: Value, d_k: int) -> Value:
    """See `reroll.mixers.feature_maps`."""
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
    raise ExportError(f"the feature map {name!r} has no lowering to ONNX")
