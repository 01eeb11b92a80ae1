"""Lower token mixers to `LinearAttention`, with changes of its inputs and outputs.

Mixers that declare a core are update rules of the operator; a normaliser is an additional column of
values. Each other mixer has a construction of its own. mLSTM's running maximum is computed in
advance, and becomes part of its decay. RWKV-6 reads before it writes, so each token is passed one
step later. The writes of DeltaProduct are separate tokens. Gated slot attention uses the operator
twice.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from reroll.errors import ExportError
from reroll.export.onnx.graph import TARGET, Value
from reroll.export.onnx.ops.linear_attention import linear_attention
from reroll.export.onnx.ops.recurrence import Tokens
from reroll.export.onnx.plan.states import CONV, features
from reroll.mixers import Mixer
from reroll.mixers.gsa import NOTHING
from reroll.mixers.mlstm import EPS
from reroll.rewrite.ir.lowerings import lowering

if TYPE_CHECKING:
    from reroll.export.onnx.emit.translate import Translator

INT, BOOL, FLOAT = torch.int64, torch.bool, torch.float32
# larger than any size
END = 2**62


@lowering(TARGET, "recurrence")
def by_core(g: Translator, node: fx.Node, mixer: Mixer, x: Tokens) -> Value:
    """Lower a mixer that declares its core: transform its keys, then apply the operator."""
    core = mixer.core
    assert core is not None
    x = unit_tokens(g, mixer, with_features(g, mixer, x))
    if core.decay == "selective":
        return selective(g, node, x)
    if core.key == "gated":
        x = replace(x, k=g.op("Mul", x.k, g.op("Unsqueeze", x.gates[1], g.ints(3))))
    elif core.key == "forgotten":
        x = replace(x, k=let_go(g, x.gates[0]))
    rule = {
        (False, False): "linear",
        (False, True): "gated",
        (True, False): "delta",
        (True, True): "gated_delta",
    }[core.delta, core.gate > 0]
    decay = x.gates[0] if core.gate else None
    beta = x.gates[-1] if core.delta else None
    if not core.counts:
        return linear_attention(g, node, x, rule, decay, beta)
    # the sum of weights is an additional column of values, and of the state
    out = linear_attention(g, node, counted(g, x), rule, decay, beta)
    values, weights = split_counted(g, out, x)
    if not mixer.normalised:
        return values
    return g.op("Div", values, g.op("Max", weights, g.number(1e-6, FLOAT)))


def selective(g: Translator, node: fx.Node, x: Tokens) -> Value:
    """Lower a scan in which each number of the state has a decay of its own.

    The operator decays by the channel of its keys. So every channel of the values is a head of its
    own, with one value channel.
    """
    dt, rate = x.gates
    groups, heads, axis = x.heads // x.kv_heads, x.kv_heads * x.d_v, g.ints(3)

    def for_channels(value: Value, width: int) -> Value:
        # [batch, kv_heads * width, time, d_k] once for each channel of the values
        value = g.op("Reshape", value, g.shape(["b", x.kv_heads, 1, width, "s", x.d_k]))
        value = g.op("Expand", value, g.ints(1, 1, x.d_v, 1, 1, 1))
        return g.op("Reshape", value, g.shape(["b", heads * width, "s", x.d_k]))

    def by_channel(value: Value, width: int) -> Value:
        # [batch, kv_heads, time, width, d_v] as [batch, kv_heads * d_v, time, width]
        turned = g.op("Transpose", value, perm=[0, 1, 4, 2, 3])
        return g.op("Reshape", turned, g.shape(["b", heads, "s", width]))

    channels = replace(
        x,
        q=for_channels(x.q, groups),
        k=for_channels(x.k, 1),
        v=by_channel(g.op("Unsqueeze", g.op("Mul", dt, x.v), axis), 1),
        heads=x.heads * x.d_v,
        kv_heads=heads,
        d_v=1,
        by_channel=True,
    )
    fades = by_channel(g.op("Mul", g.op("Unsqueeze", dt, axis), rate), x.d_k)
    out = linear_attention(g, node, channels, "gated", fades)
    out = g.op("Reshape", out, g.ints(0, 0, x.kv_heads, x.d_v, groups))
    return g.op("Transpose", out, perm=[0, 1, 2, 4, 3])


@lowering(TARGET, "recurrence:mlstm")
def mlstm(g: Translator, node: fx.Node, mixer: Any, x: Tokens) -> Value:
    """Lower exponential writes below a running maximum m_t = max(f_t + m_{t-1}, i_t).

    All m of the new tokens follow from f, i and the m before them. With f_t + m_{t-1} - m_t as the
    decay and exp(i_t - m_t) k_t as the key, the state is that of the mixer.
    """
    forget, write = x.gates
    numbers = g.states.of(g, node)
    before = g.states.read(g, numbers, "maximum")
    before = g.op("Unsqueeze", before, g.ints(2))
    sums = g.op("CumSum", forget, g.number(2, INT))
    highest = running_maximum(g, g.op("Sub", write, sums))
    tops = g.op("Add", sums, g.op("Max", highest, before))
    held = g.op("Concat", before, tops, axis=2)
    axis = g.ints(2)
    last = g.op("Slice", held, g.ints(-1), g.ints(END), axis)
    g.states.write(g, numbers, "maximum", g.op("Squeeze", last, axis))
    previous = g.op("Slice", held, g.ints(0), g.ints(-1), axis)
    decay = g.op("Sub", g.op("Add", forget, previous), tops)
    strength = g.op("Exp", g.op("Sub", write, tops))
    k = g.op("Mul", x.k, g.op("Unsqueeze", strength, g.ints(3)))
    out = linear_attention(g, node, counted(g, replace(x, k=k)), "gated", decay)
    values, weights = split_counted(g, out, x)
    least = grouped(g, x, g.op("Unsqueeze", g.op("Exp", g.op("Neg", tops)), g.ints(3)))
    least = g.op("Transpose", least, perm=[0, 2, 1, 3])
    below = g.op("Add", g.op("Max", g.op("Abs", weights), least), g.number(EPS, FLOAT))
    return g.op("Div", values, below)


@lowering(TARGET, "recurrence:gsa")
def gsa(g: Translator, node: fx.Node, mixer: Any, x: Tokens) -> Value:
    """Lower a softmax over slots between two recurrences: of the slots' keys, and of their values.

    The slots' keys decay by slot, which is the channel that is read. The operator decays by the
    channel of its keys. So every slot of the first recurrence is a head of its own, with one value
    channel.
    """
    slots, kv_heads, groups = mixer.slots, x.kv_heads, x.heads // x.kv_heads
    (decay,) = x.gates
    s = let_go(g, decay)

    def by_slot(value: Value) -> Value:
        # [batch, kv_heads, time, slots] as [batch, kv_heads * slots, time, 1]
        turned = g.op("Transpose", value, perm=[0, 1, 3, 2])
        return g.op("Reshape", turned, g.shape(["b", kv_heads * slots, "s", 1]))

    def for_slots(value: Value, heads: int, width: int) -> Value:
        # [batch, kv_heads * heads, time, width] once for each slot
        value = g.op("Reshape", value, g.shape(["b", kv_heads, 1, heads, "s", width]))
        value = g.op("Expand", value, g.ints(1, 1, slots, 1, 1, 1))
        return g.op("Reshape", value, g.shape(["b", kv_heads * slots * heads, "s", width]))

    keys = replace(
        x,
        q=for_slots(x.q, groups, x.d_k),
        k=for_slots(x.k, 1, x.d_k),
        v=by_slot(s),
        heads=slots * x.heads,
        kv_heads=slots * kv_heads,
        d_v=1,
        by_channel=False,
    )
    fades = g.op("Squeeze", by_slot(decay), g.ints(3))
    scores = linear_attention(g, node, keys, "gated", fades, part="slot_keys")
    scores = g.op("Reshape", scores, g.ints(0, 0, kv_heads, slots, groups))
    weights = g.op("Transpose", g.op("Softmax", scores, axis=3), perm=[0, 2, 4, 1, 3])
    weights = g.op("Reshape", weights, g.shape(["b", x.heads, "s", slots]))
    values = replace(x, q=weights, k=s, d_k=slots, scale=1.0)
    out = linear_attention(g, node, values, "gated", decay)
    if not mixer.log_mass:
        return out
    # the last channel is the part of the softmax's weight that falls on written tokens
    means, written = split_counted(g, out, replace(x, d_v=x.d_v - 1))
    written = g.op("Max", written, g.number(NOTHING, FLOAT))
    mass = g.op("ReduceLogSumExp", scores, g.ints(3), keepdims=0)
    mass = g.op("Reshape", mass, g.ints(0, 0, x.heads, 1))
    mass = g.op("Add", mass, g.op("Log", written))
    return g.op("Concat", g.op("Div", means, written), mass, axis=3)


@lowering(TARGET, "recurrence:deltaproduct")
def deltaproduct(g: Translator, node: fx.Node, mixer: Any, x: Tokens) -> Value:
    """Lower every write to a separate token: the first decays the state, the last reads it."""
    x = unit_tokens(g, mixer, x)
    decay, beta, keys, values = x.gates
    steps, axis = mixer.steps, g.ints(3)
    if mixer.unit_keys:
        keys = unit(g, keys)

    def in_turn(first: Value, others: Value, heads: int, width: int) -> Value:
        joined = g.op("Concat", g.op("Unsqueeze", first, axis), others, axis=3)
        return g.op("Reshape", joined, g.ints(0, heads, -1, width))

    q = g.op("Expand", g.op("Unsqueeze", x.q, axis), g.ints(1, 1, 1, steps, 1))
    rest = g.ints(0, 0, 0, 0, 0, 0, 0, steps - 1)
    fades = g.op("Pad", g.op("Unsqueeze", decay, axis), rest, g.number(0.0, FLOAT))
    tokens = replace(
        x,
        q=g.op("Reshape", q, g.ints(0, x.heads, -1, x.d_k)),
        k=in_turn(x.k, keys, x.kv_heads, x.d_k),
        v=in_turn(x.v, values, x.kv_heads, x.d_v),
    )
    fades, beta = (g.op("Reshape", gate, g.ints(0, x.kv_heads, -1)) for gate in (fades, beta))
    out = linear_attention(g, node, tokens, "gated_delta", fades, beta)
    out = g.op("Reshape", out, g.ints(0, -1, steps, x.heads * x.d_v))
    return g.op("Gather", out, g.number(steps - 1, INT), axis=2)


@lowering(TARGET, "recurrence:rwkv6")
def rwkv6(g: Translator, node: fx.Node, mixer: Any, x: Tokens) -> Value:
    """Lower read before write: the operator gets each token one step later.

    The bonus for the token itself is added to the output. The state is without the last token,
    which is stored in a separate state, as for a convolution.
    """
    x = with_features(g, mixer, x)
    decay, bonus = x.gates
    sizes = (x.d_k, x.d_k, x.d_v)
    numbers = g.states.of(g, node)
    past = g.states.read(g, numbers, CONV)
    axis = g.ints(2)
    given = g.op("Concat", x.k, decay, x.v, axis=3)
    held = g.op("Concat", g.op("Unsqueeze", past, axis), given, axis=2)
    last = g.op("Slice", held, g.ints(-1), g.ints(END), axis)
    g.states.write(g, numbers, CONV, g.op("Squeeze", last, axis))
    late = g.op("Slice", held, g.ints(0), g.ints(-1), axis)
    hints = ("late_k", "late_decay", "late_v")
    k, fades, v = g.graph.ops("Split", late, g.ints(*sizes), hints=hints, axis=3)
    out = linear_attention(g, node, replace(x, k=k, v=v), "gated", fades)
    own = g.op("Mul", x.q, grouped(g, x, g.op("Mul", bonus, x.k)))
    score = g.op("ReduceSum", own, g.ints(3), keepdims=1)
    if x.scale != 1.0:
        score = g.op("Mul", score, g.number(x.scale, FLOAT))
    extra = g.op("Transpose", g.op("Mul", score, grouped(g, x, x.v)), perm=[0, 2, 1, 3])
    return g.op("Add", out, g.op("Reshape", extra, g.ints(0, 0, x.heads * x.d_v)))


# ---- feature maps, normalisers, a running maximum


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
