"""Triton kernels: the gradients of the chunked recurrence of `diagonal`.

The gradient of a state runs backward in time as the state runs forward: dS_{t-1} = diag(a_t) (dS_t)
+ q_t do_t^T. It is computed at the end of each chunk and stored there (`scan_back`). Then all
chunks are independent: `gradients_qkg` for queries, keys and decays, `gradients_v` for values.
`diagonal_fused` computes all of it in one launch, with functions of this file.

With G the sum of log decays from the start of the sequence, a token's query contributes q . dq to
the gradient of G_t, and its key contributes -k . dk. The tokens after a chunk contribute S . dS at
its end. The gradient of g_t is the sum of these over t and all later tokens. Yang et al., 2023
(arXiv 2312.06635), section 4 and appendix C.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from reroll.kernels.diagonal import (
    beginnings,
    chunk_states,
    decays,
    faded,
    kind_of_gate,
    log_decay,
    number_type,
    scores,
    sequence,
    sequences_of,
    state_tile,
    strides,
    tile,
)


@triton.jit
def through_scores(
    dA, b_q, b_k, G, Gn, low, DT: tl.constexpr, GATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Propagate the gradient of a chunk's scores, before their decay, to queries, keys and G.

    Operands are rounded once, so that a pair of tokens adds to q . dq exactly what it subtracts
    from k . dk.
    """
    rise, fall = tl.exp(G - 0.5 * Gn), tl.exp(0.5 * Gn - G)
    if GATE == 2:
        r_q, r_k = (b_q * rise).to(DT), (b_k * fall).to(DT)
    else:
        r_q, r_k = b_q.to(DT), b_k.to(DT)
    dA = faded(dA, G, low, GATE).to(DT)
    to_q = tl.dot(dA, r_k, input_precision=PRECISION)
    to_k = tl.dot(tl.trans(dA), r_q, input_precision=PRECISION)
    through = r_q.to(tl.float32) * to_q - r_k.to(tl.float32) * to_k
    if GATE == 2:
        to_q, to_k = to_q * rise, to_k * fall
    return to_q, to_k, through


@triton.jit
def of_gate(x, GATE: tl.constexpr):
    """Sum a part of the gradient of G [BT, BK] over channels that share a gate: [BT, 1]."""
    if GATE == 1:
        x = tl.sum(x, axis=1)[:, None]
    return x


@triton.jit
def store_decay_gradient(
    dg, through, after, t, here, ck, dg_t, K: tl.constexpr, GATE: tl.constexpr
):  # fmt: skip
    """Store the gradient of g from the gradient of G at each token and at the end of the chunk.

    `through` is the former, as `of_gate` returns it; `after` is the latter.
    """
    if GATE == 1:
        from_here = tl.sum(through, axis=1)
        total = tl.sum(from_here, axis=0)
        b_dg = tl.sum(after) + total - tl.cumsum(from_here, axis=0) + from_here
        tl.store(dg + t * dg_t, b_dg, mask=here)
    elif GATE == 2:
        total = tl.sum(through, axis=0)[None, :]
        each = after + total - tl.cumsum(through, axis=0) + through
        keep = here[:, None] & (ck < K)[None, :]
        tl.store(dg + t[:, None] * dg_t + ck[None, :], each, mask=keep)


@triton.jit
def scan_back(
    q, g, do, dh, d_end, d_start, starts, scale, T,
    q_b, q_h, q_t, g_b, g_h, g_t, o_b, o_h, o_t,
    H: tl.constexpr, GROUPS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, GATE: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DT: tl.constexpr,
    HAS_END: tl.constexpr, STORE_START: tl.constexpr,
    VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of the states after each chunk, from the last chunk to the first.

    The grid is (blocks of V, blocks of K, sequences * kv_heads).
    """
    i_v, i_k, i_nh = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n, head = i_nh // H, i_nh % H
    row, first, length, slot = sequence(n, starts, T, BT, VARLEN)
    ck, cv, ot = i_k * BK + tl.arange(0, BK), i_v * BV + tl.arange(0, BV), tl.arange(0, BT)
    q += row * q_b + first * q_t + head * GROUPS * q_h
    g += row * g_b + first * g_t + head * g_h
    do += row * o_b + first * o_t + head * GROUPS * o_h

    D = tl.zeros([BK, BV], dtype=tl.float32)
    if HAS_END:
        at, inside = state_tile(d_end, i_nh.to(tl.int64), ck, cv, K, V)
        D += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    chunks = tl.cdiv(length, BT)
    for c in range(chunks):
        i = chunks - 1 - c
        after, inside = state_tile(dh, (slot + i) * H + head, ck, cv, K, V)
        tl.store(after, D.to(dh.dtype.element_ty), mask=inside)
        t = i * BT + ot
        here = t < length
        G, Gn = decays(g, t, g_t, ck, here, BT, K, GATE)
        D = D * tl.trans(tl.exp(Gn))
        for r in range(GROUPS):
            b_q = tile(q + r * q_h, t, q_t, ck, here, K) * scale
            b_do = tile(do + r * o_h, t, o_t, cv, here, V)
            queries = tl.trans((b_q * tl.exp(G)).to(DT))
            D = tl.dot(queries, b_do.to(DT), acc=D, input_precision=PRECISION)
    if STORE_START:
        at, inside = state_tile(d_start, i_nh.to(tl.int64), ck, cv, K, V)
        tl.store(at, D, mask=inside)


@triton.jit
def gradients_qkg(
    q, k, v, g, do, h, dh, dq, dk, dg, starts, scale, T, dg_part,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, g_b, g_h, g_t, o_b, o_h, o_t,
    dq_b, dq_h, dq_t, dk_b, dk_h, dk_t, dg_b, dg_h, dg_t,
    H: tl.constexpr, GROUPS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, GATE: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DT: tl.constexpr,
    VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute gradients of queries, keys and decays.

    The grid is (blocks of K, chunks, sequences * kv_heads). With GATE 1 each block of K writes a
    part of the gradient of g, at dg + block * dg_part.
    """
    i_k, i, i_nh = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n, head = i_nh // H, i_nh % H
    row, first, length, slot = sequence(n, starts, T, BT, VARLEN)
    if i * BT >= length:
        return
    ck, ot = i_k * BK + tl.arange(0, BK), tl.arange(0, BT)
    low = ot[:, None] >= ot[None, :]
    t = i * BT + ot
    here = t < length
    keep_k = here[:, None] & (ck < K)[None, :]
    q, k, v, g = beginnings(
        q, k, v, g, row, first, head * GROUPS, head,
        q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, g_b, g_h, g_t,
    )  # fmt: skip
    do += row * o_b + first * o_t + head * GROUPS * o_h
    dq += row * dq_b + first * dq_t + head * GROUPS * dq_h
    dk += row * dk_b + first * dk_t + head * dk_h
    dg += row * dg_b + first * dg_t + head * dg_h

    b_k = tile(k, t, k_t, ck, here, K)
    G, Gn = decays(g, t, g_t, ck, here, BT, K, GATE)
    # through the state: the keys' writes, and the rest of the chunk's first state at its end
    b_dk = tl.zeros([BT, BK], dtype=tl.float32)
    held = tl.zeros([BK], dtype=tl.float32)
    for j in range(tl.cdiv(V, BV)):
        cv = j * BV + tl.arange(0, BV)
        b_v = tile(v, t, v_t, cv, here, V)
        at, inside = state_tile(dh, (slot + i) * H + head, ck, cv, K, V)
        D = tl.load(at, mask=inside, other=0.0)
        b_dk = tl.dot(b_v.to(DT), tl.trans(D.to(DT)), acc=b_dk, input_precision=PRECISION)
        if GATE > 0:
            at, inside = state_tile(h, (slot + i) * H + head, ck, cv, K, V)
            S = tl.load(at, mask=inside, other=0.0)
            held += tl.sum(S.to(tl.float32) * D.to(tl.float32), axis=1)
    b_dk = b_dk * tl.exp(Gn - G)
    after = tl.exp(Gn) * held[None, :] + tl.sum(b_k * b_dk, axis=0)[None, :]

    through = of_gate(-b_k * b_dk, GATE)
    for r in range(GROUPS):
        b_q = tile(q + r * q_h, t, q_t, ck, here, K) * scale
        b_dq = tl.zeros([BT, BK], dtype=tl.float32)
        dA = tl.zeros([BT, BT], dtype=tl.float32)
        for j in range(tl.cdiv(V, BV)):
            cv = j * BV + tl.arange(0, BV)
            b_do = tile(do + r * o_h, t, o_t, cv, here, V).to(DT)
            b_v = tile(v, t, v_t, cv, here, V).to(DT)
            at, inside = state_tile(h, (slot + i) * H + head, ck, cv, K, V)
            S = tl.load(at, mask=inside, other=0.0)
            dA = tl.dot(b_do, tl.trans(b_v), acc=dA, input_precision=PRECISION)
            b_dq = tl.dot(b_do, tl.trans(S.to(DT)), acc=b_dq, input_precision=PRECISION)
        b_dq = b_dq * tl.exp(G)
        to_q, to_k, between_them = through_scores(dA, b_q, b_k, G, Gn, low, DT, GATE, PRECISION)
        through += of_gate(b_q * b_dq + between_them, GATE)
        b_dq += to_q
        b_dk += to_k
        tl.store(
            dq + r * dq_h + t[:, None] * dq_t + ck[None, :],
            (b_dq * scale).to(dq.dtype.element_ty), mask=keep_k,
        )  # fmt: skip
    tl.store(dk + t[:, None] * dk_t + ck[None, :], b_dk.to(dk.dtype.element_ty), mask=keep_k)
    if GATE > 0:
        store_decay_gradient(dg + i_k * dg_part, through, after, t, here, ck, dg_t, K, GATE)


@triton.jit
def gradients_v(
    q, k, g, do, dh, dv, starts, scale, T,
    q_b, q_h, q_t, k_b, k_h, k_t, g_b, g_h, g_t, o_b, o_h, o_t, dv_b, dv_h, dv_t,
    H: tl.constexpr, GROUPS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, GATE: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DT: tl.constexpr,
    VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute gradients of values; grid (blocks of V, chunks, sequences * kv_heads)."""
    i_v, i, i_nh = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n, head = i_nh // H, i_nh % H
    row, first, length, slot = sequence(n, starts, T, BT, VARLEN)
    if i * BT >= length:
        return
    cv, ot = i_v * BV + tl.arange(0, BV), tl.arange(0, BT)
    low = ot[:, None] >= ot[None, :]
    t = i * BT + ot
    here = t < length
    q += row * q_b + first * q_t + head * GROUPS * q_h
    k += row * k_b + first * k_t + head * k_h
    g += row * g_b + first * g_t + head * g_h
    do += row * o_b + first * o_t + head * GROUPS * o_h
    dv += row * dv_b + first * dv_t + head * dv_h

    b_dv = tl.zeros([BT, BV], dtype=tl.float32)
    for j in range(tl.cdiv(K, BK)):
        ck = j * BK + tl.arange(0, BK)
        b_k = tile(k, t, k_t, ck, here, K)
        G, Gn = decays(g, t, g_t, ck, here, BT, K, GATE)
        at, inside = state_tile(dh, (slot + i) * H + head, ck, cv, K, V)
        D = tl.load(at, mask=inside, other=0.0)
        last = (b_k * tl.exp(Gn - G)).to(DT)
        b_dv = tl.dot(last, D.to(DT), acc=b_dv, input_precision=PRECISION)
    for r in range(GROUPS):
        A = tl.zeros([BT, BT], dtype=tl.float32)
        for j in range(tl.cdiv(K, BK)):
            ck = j * BK + tl.arange(0, BK)
            b_q = tile(q + r * q_h, t, q_t, ck, here, K) * scale
            b_k = tile(k, t, k_t, ck, here, K)
            b_g = log_decay(g, t, g_t, ck, here, BT, K, GATE)
            A += scores(
                b_q, b_k, tl.cumsum(b_g, axis=0), tl.sum(b_g, axis=0)[None, :], low,
                DT, GATE, PRECISION,
            )  # fmt: skip
        one = log_decay(g, t, g_t, tl.arange(0, 1), here, BT, 1, GATE)
        A = faded(A, tl.cumsum(one, axis=0), low, GATE)
        b_do = tile(do + r * o_h, t, o_t, cv, here, V)
        b_dv = tl.dot(tl.trans(A.to(DT)), b_do.to(DT), acc=b_dv, input_precision=PRECISION)
    tl.store(
        dv + t[:, None] * dv_t + cv[None, :], b_dv.to(dv.dtype.element_ty),
        mask=here[:, None] & (cv < V)[None, :],
    )  # fmt: skip


def backward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, start: Tensor | None, starts: Tensor | None,
    do: Tensor, d_end: Tensor | None, scale: float, tiles: dict[str, dict[str, Any]],
    precision: str = "ieee",
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Compute the gradients of q, k, v, g and the first state; `do` is [batch, heads, time, V].

    `tiles` has the blocks of `states`, `scan_back`, `gradients_qkg` and `gradients_v`, which share
    their BT. Gradients have the layout of [batch, time, heads, size].
    """
    heads, groups, K, V = k.shape[1], q.shape[1] // k.shape[1], k.shape[3], v.shape[3]
    count, time = sequences_of(k, starts), k.shape[2]
    h, _ = chunk_states(k, v, g, start, starts, tiles["states"], k.dtype, precision)
    dh = torch.empty_like(h)
    d_start = k.new_empty(count, heads, K, V, dtype=torch.float32)
    dq, dk, dv = (like_by_time(x) for x in (q, k, v))
    blocks = triton.cdiv(K, tiles["gradients_qkg"]["BK"])
    dg = _gradient_of_gate(g, blocks)
    gate, packed = k if g is None else g, k if starts is None else starts
    constants = {
        "H": heads, "GROUPS": groups, "K": K, "V": V, "GATE": kind_of_gate(g),
        "DT": number_type(k), "VARLEN": starts is not None, "PRECISION": precision,
    }  # fmt: skip
    size = tiles["scan_back"]
    scan_back[(triton.cdiv(V, size["BV"]), triton.cdiv(K, size["BK"]), count * heads)](
        q, gate, do, dh, k if d_end is None else d_end, d_start, packed, scale, time,
        *strides(q), *strides(g), *strides(do),
        HAS_END=d_end is not None, STORE_START=True, **constants, **size,
    )  # fmt: skip
    size = tiles["gradients_qkg"]
    chunks = triton.cdiv(time, size["BT"])
    gradients_qkg[(blocks, chunks, count * heads)](
        q, k, v, gate, do, h, dh, dq, dk, k if dg is None else dg, packed, scale, time,
        0 if dg is None or len(dg) == 1 else dg.stride(0),
        *strides(q), *strides(k), *strides(v), *strides(g), *strides(do),
        *strides(dq), *strides(dk), *strides(None if dg is None else dg[0]),
        **constants, **size,
    )  # fmt: skip
    size = tiles["gradients_v"]
    gradients_v[(triton.cdiv(V, size["BV"]), chunks, count * heads)](
        q, k, gate, do, dh, dv, packed, scale, time,
        *strides(q), *strides(k), *strides(g), *strides(do), *strides(dv),
        **constants, **size,
    )  # fmt: skip
    return dq, dk, dv, None if dg is None else dg.sum(0) if len(dg) > 1 else dg[0], d_start


def like_by_time(x: Tensor) -> Tensor:
    """Make an empty [batch, heads, time, size] laid out as [batch, time, heads, size]."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


def _gradient_of_gate(g: Tensor | None, blocks: int) -> Tensor | None:
    """Allocate the gradient of the gate, in parts that are to be summed."""
    if g is None:
        return None
    parts = blocks if g.dim() == 3 else 1
    return g.new_empty(parts, *g.shape, dtype=torch.float32)
