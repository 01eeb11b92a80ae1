"""Triton kernel: forward of the (gated) delta rule in chunks, with the triangular inverse inside.

S_t = A_t S_{t-1} + b_t k_t (v_t - k_t A_t S_{t-1})^T, o_t = scale q_t S_t. The mathematics is that
of `reroll.mixers.delta_form`, which is the reference, with the gates of `diagonal`. The state
passes through the chunks in order. So the system of a chunk is solved for the values less what the
state predicts: u = (I + M)^-1 b (v - k S), where M_ij = b_i k_i . k_j times the decay between them,
j < i.

The inverse is built from those of diagonal blocks of 1, 2, 4, ... rows. Let X be the inverse of the
blocks of one size, and C the part of M that connects pairs of them. Then X - X C X is the inverse
of the blocks of twice the size. Every intermediate number is one of an inverse, so no precision is
lost where keys are similar and b is near 2. Powers of M, as in a Neumann series, grow without bound
there.
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
    read_chunk,
    scores,
    sequence,
    sequences_of,
    state_tile,
    strides,
    tile,
)


@triton.jit
def inverse(M, ot, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """(I + M)^-1 for a strictly lower triangular M of 2^LEVELS rows, numbered by `ot`."""
    row, column = ot[:, None], ot[None, :]
    X = tl.where(row == column, 1.0, 0.0)
    # the inverse of two rows is exact
    X = X - tl.where((row // 2 == column // 2) & (row > column), M, 0.0)
    for level in tl.static_range(1, LEVELS):
        size = 1 << level
        pairs = (row // (2 * size) == column // (2 * size)) & (row // size > column // size)
        C = tl.where(pairs, M, 0.0)
        X = X - tl.dot(tl.dot(X, C, input_precision=PRECISION), X, input_precision=PRECISION)
    return X


@triton.jit
def delta_scan(
    q, k, v, g, beta, o, start, end, starts, scale, T,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, g_b, g_h, g_t, b_b, b_h, b_t, o_b, o_h, o_t,
    H: tl.constexpr, GROUPS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, GATE: tl.constexpr,
    BT: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DT: tl.constexpr,
    HAS_START: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
    SOLVE: tl.constexpr,
):  # fmt: skip
    """Chunk by chunk; grid (blocks of V, sequences * kv_heads). BK is at least K."""
    i_v, i_nh = tl.program_id(0), tl.program_id(1)
    n, head = i_nh // H, i_nh % H
    row, first, length, _ = sequence(n, starts, T, BT, VARLEN)
    ck, cv, ot = tl.arange(0, BK), i_v * BV + tl.arange(0, BV), tl.arange(0, BT)
    low, below = ot[:, None] >= ot[None, :], ot[:, None] > ot[None, :]
    q, k, v, g = beginnings(
        q, k, v, g, row, first, head * GROUPS, head,
        q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, g_b, g_h, g_t,
    )  # fmt: skip
    beta += row * b_b + first * b_t + head * b_h
    o += row * o_b + first * o_t + head * GROUPS * o_h

    S = tl.zeros([BK, BV], dtype=tl.float32)
    if HAS_START:
        at, inside = state_tile(start, i_nh.to(tl.int64), ck, cv, K, V)
        S += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    for i in range(tl.cdiv(length, BT)):
        t = i * BT + ot
        here = t < length
        b_k = tile(k, t, k_t, ck, here, K)
        b_v = tile(v, t, v_t, cv, here, V)
        strength = tile(beta, t, b_t, tl.arange(0, 1), here, 1)
        G, Gn = decays(g, t, g_t, ck, here, BT, K, GATE)
        M = strength * faded(scores(b_k, b_k, G, Gn, low, DT, GATE, PRECISION), G, low, GATE)
        X = inverse(tl.where(below, M, 0.0), ot, LEVELS, SOLVE)
        held = tl.dot((b_k * tl.exp(G)).to(DT), S.to(DT), input_precision=PRECISION)
        u = tl.dot(X, strength * (b_v - held), input_precision=SOLVE).to(DT)
        read_chunk(
            q, o, b_k, u, S, G, Gn, low, t, here, ck, cv, scale, q_h, q_t, o_h, o_t,
            GROUPS, K, V, GATE, DT, PRECISION,
        )  # fmt: skip
        S = after_chunk(S, b_k, u, G, Gn, DT, PRECISION)
    at, inside = state_tile(end, i_nh.to(tl.int64), ck, cv, K, V)
    tl.store(at, S, mask=inside)


def delta_forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, start: Tensor | None,
    starts: Tensor | None, scale: float, tiles: dict[str, dict[str, Any]], precision: str = "ieee",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute the output [batch, time, heads, V] and the last state [sequences, kv_heads, K, V].

    `beta` [batch, kv_heads, time]; the rest is as in `diagonal.forward`.
    """
    heads, K, V, size = k.shape[1], k.shape[3], v.shape[3], tiles["delta_scan"]
    groups, count = q.shape[1] // heads, sequences_of(k, starts)
    o = v.new_empty(q.shape[0], q.shape[2], q.shape[1], V)
    end = k.new_empty(count, heads, K, V, dtype=torch.float32)
    delta_scan[(triton.cdiv(V, size["BV"]), count * heads)](
        q, k, v, k if g is None else g, beta, o, k if start is None else start, end,
        k if starts is None else starts, scale, k.shape[2],
        *strides(q), *strides(k), *strides(v), *strides(g), *strides(beta),
        *strides(o.transpose(1, 2)),
        H=heads, GROUPS=groups, K=K, V=V, GATE=kind_of_gate(g), DT=number_type(k),
        LEVELS=size["BT"].bit_length() - 1, HAS_START=start is not None,
        VARLEN=starts is not None, PRECISION=precision, SOLVE="ieee", **size,
    )  # fmt: skip
    return o, end
