"""Triton kernel: the selective scan, in which each number of the state decays by itself.

S_t = exp(dt_t A) S_{t-1} + k_t (dt_t v_t)^T, o_t = q_t S_t. The reference is the mixer with the
core "selective" (`reroll.mixers.mamba`). A program holds all rows of some columns of the state, and
goes from token to token: there are no products of matrices, and decays are multiplied one by one,
so no decay is too small. One token is a step of decoding. The gradients are in
`selective_backward`, which starts from states that are kept every CHUNK tokens.

Shapes: q [batch, kv_heads * GROUPS, time, K], k [batch, kv_heads, time, K], v and dt [.., V], rate
[batch or 1, kv_heads, time or 1, K, V]. Strides are arbitrary, except that of the last dimension of
q, k, v and dt, which is 1. o [batch, time, heads, V]; states [sequences, kv_heads, K, V] in fp32.
Packed sequences, and the places of kept states, are as in `diagonal`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from reroll.kernels.diagonal import (
    beginnings,
    sequence,
    sequences_of,
    slots_of,
    state_tile,
    strides,
)

# tokens between states that are kept for gradients
CHUNK = 64


@triton.jit
def token(pointer, columns, size: tl.constexpr):
    """Some numbers of a token in fp32, and zeros outside."""
    return tl.load(pointer + columns, mask=columns < size, other=0.0).to(tl.float32)


@triton.jit
def selective_scan(
    q, k, v, dt, rate, o, h, start, end, starts, T,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, d_b, d_h, d_t, r_b, r_h, r_t, r_k, r_v,
    o_b, o_h, o_t,
    H: tl.constexpr, GROUPS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, BT: tl.constexpr, CONSTANT: tl.constexpr, HAS_START: tl.constexpr,
    STORE_O: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Token by token; grid (blocks of V, sequences * kv_heads). BK is at least K.

    Writes the output, or the states before each BT tokens.
    """
    i_v, i_nh = tl.program_id(0), tl.program_id(1)
    n, head = i_nh // H, i_nh % H
    row, first, length, slot = sequence(n, starts, T, BT, VARLEN)
    ck, cv = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    q, k, v, dt = beginnings(
        q, k, v, dt, row, first, head * GROUPS, head,
        q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, d_b, d_h, d_t,
    )  # fmt: skip
    o += row * o_b + first * o_t + head * GROUPS * o_h
    rate += row * r_b + first * r_t + head * r_h + ck[:, None] * r_k + cv[None, :] * r_v
    inside = (ck < K)[:, None] & (cv < V)[None, :]

    S = tl.zeros([BK, BV], dtype=tl.float32)
    if HAS_START:
        at, _ = state_tile(start, i_nh.to(tl.int64), ck, cv, K, V)
        S += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    A = tl.load(rate, mask=inside, other=0.0).to(tl.float32)
    for t in range(length):
        if not STORE_O and t % BT == 0:
            before, _ = state_tile(h, (slot + t // BT) * H + head, ck, cv, K, V)
            tl.store(before, S, mask=inside)
        if not CONSTANT:
            A = tl.load(rate, mask=inside, other=0.0).to(tl.float32)
            rate += r_t
        b_k, b_v, step = token(k, ck, K), token(v, cv, V), token(dt, cv, V)
        S = S * tl.exp(A * step[None, :]) + b_k[:, None] * (step * b_v)[None, :]
        if STORE_O:
            for r in range(GROUPS):
                b_o = tl.sum(S * token(q + r * q_h, ck, K)[:, None], axis=0)
                tl.store(o + r * o_h + cv, b_o.to(o.dtype.element_ty), mask=cv < V)
        q += q_t
        k += k_t
        v += v_t
        dt += d_t
        o += o_t
    at, _ = state_tile(end, i_nh.to(tl.int64), ck, cv, K, V)
    tl.store(at, S, mask=inside)


def forward(
    q: Tensor, k: Tensor, v: Tensor, dt: Tensor, rate: Tensor, start: Tensor | None,
    starts: Tensor | None, tiles: dict[str, Any],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute the output [batch, time, heads, V] and the last state [sequences, kv_heads, K, V]."""
    o = v.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])
    return o, _scan(q, k, v, dt, rate, o.transpose(1, 2), None, start, starts, tiles)


def kept_states(
    k: Tensor, v: Tensor, dt: Tensor, rate: Tensor, start: Tensor | None, starts: Tensor | None,
    tiles: dict[str, Any],
) -> Tensor:  # fmt: skip
    """Compute the states before each CHUNK tokens: [slots, kv_heads, K, V] in fp32."""
    shape = slots_of(k, starts, CHUNK), k.shape[1], k.shape[3], v.shape[3]
    h = k.new_empty(shape, dtype=torch.float32)
    _scan(k, k, v, dt, rate, None, h, start, starts, tiles)
    return h


def _scan(
    q: Tensor, k: Tensor, v: Tensor, dt: Tensor, rate: Tensor, o: Tensor | None, h: Tensor | None,
    start: Tensor | None, starts: Tensor | None, tiles: dict[str, Any],
) -> Tensor:  # fmt: skip
    heads, K, V, count = k.shape[1], k.shape[3], v.shape[3], sequences_of(k, starts)
    end = k.new_empty(count, heads, K, V, dtype=torch.float32)
    selective_scan[(triton.cdiv(V, tiles["BV"]), count * heads)](
        q, k, v, dt, rate, *(k if x is None else x for x in (o, h, start)), end,
        k if starts is None else starts, k.shape[2],
        *strides(q), *strides(k), *strides(v), *strides(dt), *rate_strides(rate), *strides(o),
        H=heads, GROUPS=q.shape[1] // heads, K=K, V=V, BK=rows_of(K), BT=CHUNK,
        CONSTANT=rate.shape[2] == 1, HAS_START=start is not None, STORE_O=o is not None,
        VARLEN=starts is not None, **tiles,
    )  # fmt: skip
    return end


def rate_strides(rate: Tensor) -> tuple[int, ...]:
    """Return all strides of rates, those of batch and time 0 where they are given once."""
    return tuple(
        0 if size == 1 else stride for size, stride in zip(rate.shape, rate.stride(), strict=True)
    )


def rows_of(K: int) -> int:
    """Return the rows of a block that has all of a state: a power of two, from 16."""
    size: int = triton.next_power_of_2(K)
    return max(16, size)
