"""Triton kernel: attention over a window and the first tokens, with an optional linear branch.

The branch shares the normaliser of the softmax:

    o = (sum_near exp(s - m) v + e^-m gain f(q) H) / (sum_near exp(s - m) + e^-m gain f(q) z)

Here `near` are the last `window` tokens and the first `prefix`, and m is the highest of their
scores. H and z are the sums of f(k) v^T and f(k) over all tokens between: LoLCATs (arXiv
2410.10254), equation 6. Without a branch it is attention over a window with sinks (arXiv
2309.17453). Only tiles of keys that some query of a block may see are read, so the work grows with
the length, not its square.

The branch is given as the output of a chunked linear recurrence that is delayed by `window` tokens.
It is `far` [batch, time, heads, V + 1], whose last column is the sum of weights (`linear` with a
column of ones).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from reroll.kernels.diagonal import number_type, strides


def window_reference(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, prefix: int = 0,
    far: Tensor | None = None, first: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Compute the definition in fp32: q [batch, heads, time, K], k, v [batch, kv_heads, time, ...].

    `first` [batch] is each row's first token that is not padding. Returns [batch, time, heads, V].
    """
    groups, time = q.shape[1] // k.shape[1], q.shape[2]
    k, v = (x.float().repeat_interleave(groups, 1) for x in (k, v))
    start = torch.zeros(len(q), dtype=torch.long) if first is None else first.long()
    row, column = torch.arange(time)[:, None], torch.arange(time)[None, :]
    first_key = start[:, None, None]
    near = (column > row - window) | (column - first_key < prefix)
    visible = ((column <= row) & (column >= first_key) & near)[:, None]
    scores = (q.float() @ k.mT * scale).masked_fill(~visible, -torch.inf)
    high = scores.amax(-1, keepdim=True)
    high = torch.where(high.isfinite(), high, 0.0)
    p = (scores - high).exp()
    top, below = p @ v, p.sum(-1, keepdim=True)
    if far is not None:
        branch = (-high).exp() * far.float().transpose(1, 2)
        top, below = top + branch[..., :-1], below + branch[..., -1:]
    out = torch.where(below > 0, top / below, 0.0)
    return out.transpose(1, 2).to(v.dtype)


@triton.jit
def near_tile(
    q, k, v, column, row, in_time, first, m, total, acc, scale, window, prefix, k_t, v_t,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys at the columns `column`: highest score, sum of weights and of values."""
    ck, cv = tl.arange(0, BK), tl.arange(0, BV)
    b_k = tl.load(k + column[:, None] * k_t + ck[None, :],
                  mask=in_time[:, None] & (ck < K)[None, :], other=0.0).to(DT)  # fmt: skip
    b_v = tl.load(v + column[:, None] * v_t + cv[None, :],
                  mask=in_time[:, None] & (cv < V)[None, :], other=0.0).to(DT)  # fmt: skip
    s = tl.dot(q, tl.trans(b_k), input_precision=PRECISION) * scale
    near = (column[None, :] > row[:, None] - window) | (column[None, :] - first < prefix)
    visible = (
        near & (column[None, :] <= row[:, None]) & in_time[None, :] & (column >= first)[None, :]
    )
    s = tl.where(visible, s, float("-inf"))
    new = tl.maximum(m, tl.max(s, axis=1))
    shift = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp(s - shift[:, None])
    shrink = tl.exp(m - shift)
    total = total * shrink + tl.sum(p, axis=1)
    acc = tl.dot(p.to(DT), b_v, acc=acc * shrink[:, None], input_precision=PRECISION)
    return new, total, acc


@triton.jit
def window_attention_tile(
    q, k, v, far, first, o, scale, window, prefix, T,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, f_b, f_h, f_t, o_b, o_h, o_t,
    H: tl.constexpr, GROUPS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DT: tl.constexpr,
    HAS_FAR: tl.constexpr, HAS_FIRST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of queries, batch * heads)."""
    i_m, i_bh = tl.program_id(0), tl.program_id(1)
    b, head = (i_bh // (H * GROUPS)).to(tl.int64), i_bh % (H * GROUPS)
    kv = head // GROUPS
    q += b * q_b + head * q_h
    k += b * k_b + kv * k_h
    v += b * v_b + kv * v_h
    row, ck, cv = i_m * BM + tl.arange(0, BM), tl.arange(0, BK), tl.arange(0, BV)
    here = row < T
    first_key = 0
    if HAS_FIRST:
        first_key = tl.load(first + b).to(tl.int32)
    b_q = tl.load(q + row[:, None] * q_t + ck[None, :], mask=here[:, None] & (ck < K)[None, :],
                  other=0.0).to(DT)  # fmt: skip
    m = tl.full([BM], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BM], dtype=tl.float32)
    acc = tl.zeros([BM, BV], dtype=tl.float32)
    # the tile where the window of the block's first query begins; the first tokens' tiles end there
    low = tl.maximum(i_m * BM - window + 1, 0) // BN * BN
    for j in range(first_key // BN, tl.cdiv(tl.minimum(first_key + prefix, low), BN)):
        column = j * BN + tl.arange(0, BN)
        m, total, acc = near_tile(
            b_q, k, v, column, row, column < tl.minimum(low, T), first_key, m, total, acc, scale,
            window, prefix, k_t, v_t, K, V, BK, BV, DT, PRECISION,
        )  # fmt: skip
    for j in range(low // BN, tl.cdiv(tl.minimum(i_m * BM + BM, T), BN)):
        column = j * BN + tl.arange(0, BN)
        m, total, acc = near_tile(
            b_q, k, v, column, row, column < T, first_key, m, total, acc, scale,
            window, prefix, k_t, v_t, K, V, BK, BV, DT, PRECISION,
        )  # fmt: skip
    if HAS_FAR:
        far += b * f_b + head * f_h
        b_f = tl.load(far + row[:, None] * f_t + cv[None, :],
                      mask=here[:, None] & (cv < V)[None, :], other=0.0)  # fmt: skip
        weight = tl.load(far + row * f_t + V, mask=here, other=0.0).to(tl.float32)
        factor = tl.exp(-tl.where(m == float("-inf"), 0.0, m))
        acc += factor[:, None] * b_f.to(tl.float32)
        total += factor * weight
    out = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(
        o + b * o_b + head * o_h + row[:, None] * o_t + cv[None, :], out.to(o.dtype.element_ty),
        mask=here[:, None] & (cv < V)[None, :],
    )  # fmt: skip


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, prefix: int = 0,
    far: Tensor | None = None, first: Tensor | None = None, *, tiles: dict[str, Any],
    precision: str = "ieee",
) -> Tensor:  # fmt: skip
    """Compute `window_reference`; `tiles` has BM, BN. Rows of padding give zeros."""
    heads, K, V = q.shape[1], k.shape[3], v.shape[3]
    o = v.new_empty(q.shape[0], q.shape[2], heads, V)
    window_attention_tile[(triton.cdiv(q.shape[2], tiles["BM"]), q.shape[0] * heads)](
        q, k, v, q if far is None else far, q if first is None else first, o,
        scale, window, prefix, q.shape[2],
        *strides(q), *strides(k), *strides(v),
        *strides(None if far is None else far.transpose(1, 2)), *strides(o.transpose(1, 2)),
        H=k.shape[1], GROUPS=heads // k.shape[1], K=K, V=V,
        BK=max(16, triton.next_power_of_2(K)), BV=max(16, triton.next_power_of_2(V)),
        DT=number_type(k), HAS_FAR=far is not None, HAS_FIRST=first is not None,
        PRECISION=precision, **tiles,
    )  # fmt: skip
    return o
