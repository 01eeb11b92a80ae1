"""Triton kernel: the gradients of the selective scan of `selective`.

The gradient of a state runs backward in time: dS_{t-1} = exp(dt_t A) dS_t + q_{t-1} do_{t-1}^T. It
needs the state before each token. A program goes from the last chunk of CHUNK tokens to the first:
it computes the states of a chunk again, from the one that is kept before it, into memory of its
own, and then goes back through them. So the states of all tokens are never held at once.

The reference is the gradient of the mixer's forms. Shapes are those of `selective`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from reroll.kernels.diagonal import beginnings, sequence, sequences_of, state_tile, strides
from reroll.kernels.selective import CHUNK, kept_states, rate_strides, rows_of, token


@triton.jit
def selective_back(
    q, k, v, dt, rate, do, h, d_end, starts, held, dq, dk, dv, d_dt, d_rate, d_start, T,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, d_b, d_h, d_t, r_b, r_h, r_t, r_k, r_v,
    o_b, o_h, o_t, B,
    H: tl.constexpr, GROUPS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, BT: tl.constexpr, CONSTANT: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Token by token, backward; grid (blocks of V, sequences * kv_heads). BK is at least K.

    Gradients have no strides: dq [blocks of V, batch, heads, time, K] and dk [blocks, batch,
    kv_heads, time, K] are what this block contributes; dv and d_dt [batch, kv_heads, time, V].
    d_rate is [sequences, kv_heads, K, V] where rates are CONSTANT, else [batch, kv_heads, time, K,
    V]. `held` [programs, BT, BK, BV] is memory for the states of a chunk. B: rows of the batch.
    """
    i_v, i_nh = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n, head = i_nh // H, i_nh % H
    row, first, length, slot = sequence(n, starts, T, BT, VARLEN)
    ck, cv = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    q, k, v, dt = beginnings(
        q, k, v, dt, row, first, head * GROUPS, head,
        q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, d_b, d_h, d_t,
    )  # fmt: skip
    do += row * o_b + first * o_t + head * GROUPS * o_h
    rate += row * r_b + first * r_t + head * r_h + ck[:, None] * r_k + cv[None, :] * r_v
    inside = (ck < K)[:, None] & (cv < V)[None, :]
    # the first token of the sequence in tensors without strides
    here = (row * H + head) * T + first
    here_q = (row * H + head) * GROUPS * T + first
    dq += (i_v * B * H * GROUPS * T + here_q) * K
    dk += (i_v * B * H * T + here) * K
    dv += here * V
    d_dt += here * V
    place = ck[:, None] * BV + tl.arange(0, BV)[None, :]
    held += (i_v * tl.num_programs(1) + i_nh) * BT * BK * BV + place

    at, _ = state_tile(d_end, i_nh.to(tl.int64), ck, cv, K, V)
    dS = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    A = tl.load(rate, mask=inside, other=0.0).to(tl.float32)
    dA = tl.zeros([BK, BV], dtype=tl.float32)
    chunks = tl.cdiv(length, BT)
    for j in range(chunks):
        i = chunks - 1 - j
        at, _ = state_tile(h, (slot + i) * H + head, ck, cv, K, V)
        S = tl.load(at, mask=inside, other=0.0)
        count = tl.minimum(BT, length - i * BT)
        for s in range(count):
            t = i * BT + s
            tl.store(held + s * BK * BV, S)
            if not CONSTANT:
                A = tl.load(rate + t * r_t, mask=inside, other=0.0).to(tl.float32)
            b_k, step = token(k + t * k_t, ck, K), token(dt + t * d_t, cv, V)
            written = step * token(v + t * v_t, cv, V)
            S = S * tl.exp(A * step[None, :]) + b_k[:, None] * written[None, :]
        # what other threads have held is read below
        tl.debug_barrier()
        for u in range(count):
            s = count - 1 - u
            t = i * BT + s
            before = tl.load(held + s * BK * BV)
            if not CONSTANT:
                A = tl.load(rate + t * r_t, mask=inside, other=0.0).to(tl.float32)
            b_k, step = token(k + t * k_t, ck, K), token(dt + t * d_t, cv, V)
            b_v = token(v + t * v_t, cv, V)
            for r in range(GROUPS):
                b_do = token(do + r * o_h + t * o_t, cv, V)
                b_q = token(q + r * q_h + t * q_t, ck, K)
                dS += b_q[:, None] * b_do[None, :]
                b_dq = tl.sum(S * b_do[None, :], axis=1)
                tl.store(dq + (r * T + t) * K + ck, b_dq, mask=ck < K)
            written = step * b_v
            b_dk = tl.sum(dS * written[None, :], axis=1)
            tl.store(dk + t * K + ck, b_dk, mask=ck < K)
            d_written = tl.sum(dS * b_k[:, None], axis=0)
            dS = dS * tl.exp(A * step[None, :])
            # the gradient of the log decay
            d_log = dS * before
            b_d_dt = tl.sum(d_log * A, axis=0) + d_written * b_v
            tl.store(dv + t * V + cv, d_written * step, mask=cv < V)
            tl.store(d_dt + t * V + cv, b_d_dt, mask=cv < V)
            if CONSTANT:
                dA += d_log * step[None, :]
            else:
                at, _ = state_tile(d_rate, here + t, ck, cv, K, V)
                tl.store(at, d_log * step[None, :], mask=inside)
            S = before
        # the next chunk's states take the same memory
        tl.debug_barrier()
    if CONSTANT:
        at, _ = state_tile(d_rate, i_nh.to(tl.int64), ck, cv, K, V)
        tl.store(at, dA, mask=inside)
    at, _ = state_tile(d_start, i_nh.to(tl.int64), ck, cv, K, V)
    tl.store(at, dS, mask=inside)


def backward(
    q: Tensor, k: Tensor, v: Tensor, dt: Tensor, rate: Tensor, start: Tensor | None,
    starts: Tensor | None, do: Tensor, d_end: Tensor, tiles: dict[str, dict[str, Any]],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the gradients of q, k, v, dt, rate and the first states, in fp32.

    `do` is [batch, heads, time, V], `d_end` [sequences, kv_heads, K, V].
    """
    size, (batch, heads, time, K), V = tiles["selective_back"], k.shape, v.shape[3]
    count, rows = sequences_of(k, starts), rows_of(K)
    blocks, constant = triton.cdiv(V, size["BV"]), rate.shape[2] == 1
    h = kept_states(k, v, dt, rate, start, starts, tiles["selective_scan"])

    def new(*shape: int) -> Tensor:
        return k.new_empty(shape, dtype=torch.float32)

    dq, dk = new(blocks, *q.shape), new(blocks, *k.shape)
    dv, d_dt = new(*v.shape), new(*v.shape)
    d_rate = new(count, heads, 1, K, V) if constant else new(batch, heads, time, K, V)
    d_start = new(count, heads, K, V)
    selective_back[(blocks, count * heads)](
        q, k, v, dt, rate, do, h, d_end, k if starts is None else starts,
        new(blocks * count * heads, CHUNK, rows, size["BV"]), dq, dk, dv, d_dt, d_rate, d_start,
        time,
        *strides(q), *strides(k), *strides(v), *strides(dt), *rate_strides(rate), *strides(do),
        batch,
        H=heads, GROUPS=q.shape[1] // heads, K=K, V=V, BK=rows, BT=CHUNK, CONSTANT=constant,
        VARLEN=starts is not None, **size,
    )  # fmt: skip
    if rate.shape[0] == 1:
        # given once for all rows
        d_rate = d_rate.sum(0, keepdim=True)
    return dq.sum(0), dk.sum(0), dv, d_dt, d_rate, d_start
