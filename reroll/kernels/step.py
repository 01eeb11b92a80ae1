"""Triton kernel: one token of a recurrence, for decoding; states are in slots of a pool.

S <- A S + b k (v - k A S)^T with the delta rule, S <- A S + k v^T without; o = gain scale q S. One
launch reads each state once and writes it once. It also computes gates from their raw numbers,
normalises queries and keys to length one, and scales heads. The reference is `Mixer.step`.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

# log decays of a raw gate x: x, log sigmoid(x) / normaliser, -softplus(x), floor sigmoid(x)
GIVEN, LOG_SIGMOID, SOFTPLUS, FLOOR_SIGMOID = 0, 1, 2, 3


@triton.jit
def softplus(x):
    """log(1 + exp x), for any x."""
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def decay_of(raw, ACTIVATION: tl.constexpr, normaliser, floor, HAS_FLOOR: tl.constexpr):
    """Exp of the log decay that a raw number stands for."""
    if ACTIVATION == 1:
        raw = -softplus(-raw) / normaliser
    elif ACTIVATION == 2:
        raw = -softplus(raw)
    elif ACTIVATION == 3:
        raw = floor / (1.0 + tl.exp(-raw))
    if HAS_FLOOR:
        raw = tl.maximum(raw, floor)
    return tl.exp(raw)


@triton.jit
def recurrent_step(
    q, k, v, g, beta, gain, old, new, slots, o, scale, normaliser, floor,
    q_b, q_h, k_b, k_h, v_b, v_h, g_b, g_h, b_b, b_h, o_b, o_h,
    H: tl.constexpr, GROUPS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, GATE: tl.constexpr,
    ACTIVATION: tl.constexpr, HAS_FLOOR: tl.constexpr, DELTA: tl.constexpr, UNIT: tl.constexpr,
    HAS_GAIN: tl.constexpr, HAS_SLOTS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of V, rows * kv_heads). A row whose slot is below 0 is left out."""
    i_v, i_nh = tl.program_id(0), tl.program_id(1)
    n, head = i_nh // H, i_nh % H
    ck, cv = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    in_k, in_v = ck < K, cv < V
    slot = n.to(tl.int64)
    if HAS_SLOTS:
        slot = tl.load(slots + n).to(tl.int64)
        if slot < 0:
            return
    offsets = (slot * H + head) * K * V + ck[:, None] * V + cv[None, :]
    inside = in_k[:, None] & in_v[None, :]
    S = tl.load(old + offsets, mask=inside, other=0.0)
    b_k = tl.load(k + n * k_b + head * k_h + ck, mask=in_k, other=0.0).to(tl.float32)
    b_v = tl.load(v + n * v_b + head * v_h + cv, mask=in_v, other=0.0).to(tl.float32)
    if UNIT:
        b_k *= tl.rsqrt(tl.sum(b_k * b_k, axis=0) + 1e-6)
    if GATE == 1:
        raw = tl.load(g + n * g_b + head * g_h).to(tl.float32)
        S *= decay_of(raw, ACTIVATION, normaliser, floor, HAS_FLOOR)
    elif GATE == 2:
        raw = tl.load(g + n * g_b + head * g_h + ck, mask=in_k, other=0.0).to(tl.float32)
        S *= decay_of(raw, ACTIVATION, normaliser, floor, HAS_FLOOR)[:, None]
    if DELTA:
        strength = tl.load(beta + n * b_b + head * b_h).to(tl.float32)
        b_v = strength * (b_v - tl.sum(S * b_k[:, None], axis=0))
    S += b_k[:, None] * b_v[None, :]
    tl.store(new + offsets, S, mask=inside)
    for r in range(GROUPS):
        query_head = head * GROUPS + r
        b_q = tl.load(q + n * q_b + query_head * q_h + ck, mask=in_k, other=0.0).to(tl.float32)
        if UNIT:
            b_q *= tl.rsqrt(tl.sum(b_q * b_q, axis=0) + 1e-6)
        b_o = tl.sum(S * b_q[:, None], axis=0) * scale
        if HAS_GAIN:
            b_o *= tl.load(gain + query_head).to(tl.float32)
        tl.store(o + n * o_b + query_head * o_h + cv, b_o.to(o.dtype.element_ty), mask=in_v)


def step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, state: Tensor,
    slots: Tensor | None = None, *, into: Tensor | None = None, scale: float = 1.0,
    activation: int = GIVEN, normaliser: float = 1.0, floor: float | None = None,
    unit: bool = False, gain: Tensor | None = None, tiles: dict[str, Any],
) -> Tensor:  # fmt: skip
    """Apply one token to states, in place, or `into` another pool; return [rows, heads, V].

    `q` [rows, heads, K], `k` [rows, kv_heads, K], `v` [.., V], `g` [rows, kv_heads] or [.., K] or
    None, `beta` [rows, kv_heads] for the delta rule, `state` [slots, kv_heads, K, V] in fp32.
    `slots` [rows] int32 are the slots of the rows' states. A row with a slot below 0 changes no
    state, and its output is undefined. `gain` [heads] multiplies the output.
    """
    rows, heads, K = k.shape
    V = v.shape[2]
    o = v.new_empty(rows, q.shape[1], V)
    blocks = triton.next_power_of_2(K)
    nothing = state if g is None else g
    recurrent_step[(triton.cdiv(V, tiles["BV"]), rows * heads)](
        q, k, v, nothing, nothing if beta is None else beta, nothing if gain is None else gain,
        state, state if into is None else into, state if slots is None else slots, o,
        scale, normaliser, 0.0 if floor is None else floor,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        0 if g is None else g.stride(0), 0 if g is None else g.stride(1),
        0 if beta is None else beta.stride(0), 0 if beta is None else beta.stride(1),
        o.stride(0), o.stride(1),
        H=heads, GROUPS=q.shape[1] // heads, K=K, V=V, GATE=0 if g is None else g.dim() - 1,
        ACTIVATION=activation, HAS_FLOOR=floor is not None, DELTA=beta is not None, UNIT=unit,
        HAS_GAIN=gain is not None, HAS_SLOTS=slots is not None, BK=blocks, **tiles,
    )  # fmt: skip
    return o
