"""Triton kernel: all gradients of the chunked recurrence of `diagonal`, in one launch.

Each program computes one sequence and one key-value head. It runs forward through the chunks and
stores the state before each. Then it runs backward with the gradient of the state, and completes
each chunk before the next. Queries, keys, values and gates are read twice, states are written and
read once, and gradients of states stay on the chip. The state and its gradient are in registers, so
only heads with small enough states have tiles for it; `diagonal_backward` is for the others. The
mathematics is described there.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from reroll.kernels.diagonal import (
    after_chunk,
    beginnings,
    decays,
    faded,
    kind_of_gate,
    number_type,
    scores,
    sequence,
    sequences_of,
    slots_of,
    state_tile,
    strides,
    tile,
)
from reroll.kernels.diagonal_backward import (
    like_by_time,
    of_gate,
    store_decay_gradient,
    through_scores,
)


@triton.jit
def store_states(
    S, k, v, g, h, slot, length, ck, cv, head, k_t, v_t, g_t,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, GATE: tl.constexpr, BT: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Run forward through the chunks from the state S, and store the state before each."""
    for i in range(tl.cdiv(length, BT)):
        before, inside = state_tile(h, (slot + i) * H + head, ck, cv, K, V)
        tl.store(before, S.to(h.dtype.element_ty), mask=inside)
        t = i * BT + tl.arange(0, BT)
        here = t < length
        G, Gn = decays(g, t, g_t, ck, here, BT, K, GATE)
        S = after_chunk(
            S, tile(k, t, k_t, ck, here, K), tile(v, t, v_t, cv, here, V).to(DT),
            G, Gn, DT, PRECISION,
        )  # fmt: skip


@triton.jit
def through_state(
    D, b_k, b_v, b_h, G, Gn, DT: tl.constexpr, GATE: tl.constexpr, PRECISION: tl.constexpr
):
    """Propagate D, the gradient of the state after a chunk.

    Returns its part of the gradients of keys and values, and of G at the tokens and at the end of
    the chunk.
    """
    held = tl.sum(b_h.to(tl.float32) * D, axis=1)
    fades = tl.exp(Gn - G)
    b_dv = tl.dot((b_k * fades).to(DT), D.to(DT), input_precision=PRECISION)
    b_dk = tl.dot(b_v, tl.trans(D.to(DT)), input_precision=PRECISION) * fades
    after = tl.exp(Gn) * held[None, :] + tl.sum(b_k * b_dk, axis=0)[None, :]
    return b_dk, b_dv, of_gate(-b_k * b_dk, GATE), after


@triton.jit
def fused_back(
    q, k, v, g, do, h, start, d_end, dq, dk, dv, dg, d_start, starts, scale, T,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, g_b, g_h, g_t, o_b, o_h, o_t,
    dq_b, dq_h, dq_t, dk_b, dk_h, dk_t, dv_b, dv_h, dv_t, dg_b, dg_h, dg_t,
    H: tl.constexpr, GROUPS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, GATE: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DT: tl.constexpr,
    HAS_START: tl.constexpr, HAS_END: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute all gradients; grid (sequences * kv_heads). BK and BV are at least K and V."""
    i_nh = tl.program_id(0)
    n, head = i_nh // H, i_nh % H
    row, first, length, slot = sequence(n, starts, T, BT, VARLEN)
    ck, cv, ot = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, BT)
    low = ot[:, None] >= ot[None, :]
    q, k, v, g = beginnings(
        q, k, v, g, row, first, head * GROUPS, head,
        q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, g_b, g_h, g_t,
    )  # fmt: skip
    dq, dk, dv, dg = beginnings(
        dq, dk, dv, dg, row, first, head * GROUPS, head,
        dq_b, dq_h, dq_t, dk_b, dk_h, dk_t, dv_b, dv_h, dv_t, dg_b, dg_h, dg_t,
    )  # fmt: skip
    do += row * o_b + first * o_t + head * GROUPS * o_h

    S = tl.zeros([BK, BV], dtype=tl.float32)
    if HAS_START:
        at, inside = state_tile(start, i_nh.to(tl.int64), ck, cv, K, V)
        S += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    store_states(
        S, k, v, g, h, slot, length, ck, cv, head, k_t, v_t, g_t, H, K, V, GATE, BT, DT, PRECISION
    )
    # a thread may read states that another thread of the program has written
    tl.debug_barrier()

    D = tl.zeros([BK, BV], dtype=tl.float32)
    if HAS_END:
        at, inside = state_tile(d_end, i_nh.to(tl.int64), ck, cv, K, V)
        D += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    chunks = tl.cdiv(length, BT)
    for c in range(chunks):
        i = chunks - 1 - c
        t = i * BT + ot
        here = t < length
        keep_k = here[:, None] & (ck < K)[None, :]
        b_k = tile(k, t, k_t, ck, here, K)
        b_v = tile(v, t, v_t, cv, here, V).to(DT)
        G, Gn = decays(g, t, g_t, ck, here, BT, K, GATE)
        before, inside = state_tile(h, (slot + i) * H + head, ck, cv, K, V)
        b_h = tl.load(before, mask=inside, other=0.0)
        b_dk, b_dv, through, after = through_state(D, b_k, b_v, b_h, G, Gn, DT, GATE, PRECISION)
        D = D * tl.trans(tl.exp(Gn))
        # keeps the compiler from loading queries earlier, which would occupy registers until here
        tl.debug_barrier()
        for r in range(GROUPS):
            b_q = tile(q + r * q_h, t, q_t, ck, here, K) * scale
            b_do = tile(do + r * o_h, t, o_t, cv, here, V).to(DT)
            A = faded(scores(b_q, b_k, G, Gn, low, DT, GATE, PRECISION), G, low, GATE)
            b_dv = tl.dot(tl.trans(A.to(DT)), b_do, acc=b_dv, input_precision=PRECISION)
            dA = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
            # loaded again, because it would otherwise occupy registers until here
            b_h = tl.load(before, mask=inside, other=0.0)
            b_dq = tl.dot(b_do, tl.trans(b_h.to(DT)), input_precision=PRECISION) * tl.exp(G)
            to_q, to_k, between_them = through_scores(dA, b_q, b_k, G, Gn, low, DT, GATE, PRECISION)
            through += of_gate(b_q * b_dq + between_them, GATE)
            b_dk += to_k
            tl.store(
                dq + r * dq_h + t[:, None] * dq_t + ck[None, :],
                ((b_dq + to_q) * scale).to(dq.dtype.element_ty), mask=keep_k,
            )  # fmt: skip
            queries = tl.trans((b_q * tl.exp(G)).to(DT))
            D = tl.dot(queries, b_do, acc=D, input_precision=PRECISION)
        tl.store(dk + t[:, None] * dk_t + ck[None, :], b_dk.to(dk.dtype.element_ty), mask=keep_k)
        tl.store(
            dv + t[:, None] * dv_t + cv[None, :], b_dv.to(dv.dtype.element_ty),
            mask=here[:, None] & (cv < V)[None, :],
        )  # fmt: skip
        if GATE > 0:
            store_decay_gradient(dg, through, after, t, here, ck, dg_t, K, GATE)
    at, inside = state_tile(d_start, i_nh.to(tl.int64), ck, cv, K, V)
    tl.store(at, D, mask=inside)


def fused_backward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, start: Tensor | None, starts: Tensor | None,
    do: Tensor, d_end: Tensor | None, scale: float, tiles: dict[str, dict[str, Any]],
    precision: str = "ieee",
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Compute what `diagonal_backward.backward` does; `tiles` has the blocks of `fused_back`."""
    size, heads, K, V = tiles["fused_back"], k.shape[1], k.shape[3], v.shape[3]
    count = sequences_of(k, starts)
    h = k.new_empty(slots_of(k, starts, size["BT"]), heads, K, V)
    d_start = k.new_empty(count, heads, K, V, dtype=torch.float32)
    dq, dk, dv = map(like_by_time, (q, k, v))
    dg = None if g is None else g.new_empty(g.shape, dtype=torch.float32)
    assert size["BK"] >= K
    assert size["BV"] >= V
    fused_back[(count * heads,)](
        q, k, v, k if g is None else g, do, h, k if start is None else start,
        k if d_end is None else d_end, dq, dk, dv, k if dg is None else dg, d_start,
        k if starts is None else starts, scale, k.shape[2],
        *strides(q), *strides(k), *strides(v), *strides(g), *strides(do),
        *strides(dq), *strides(dk), *strides(dv), *strides(dg),
        H=heads, GROUPS=q.shape[1] // heads, K=K, V=V, GATE=kind_of_gate(g), DT=number_type(k),
        HAS_START=start is not None, HAS_END=d_end is not None, VARLEN=starts is not None,
        PRECISION=precision, **size,
    )  # fmt: skip
    return dq, dk, dv, dg, d_start
