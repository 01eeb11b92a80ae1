"""Triton kernels: S_t = diag(a_t) S_{t-1} + k_t v_t^T, o_t = scale q_t S_t, in chunks.

The mathematics is that of `reroll.mixers.linear_form` and `decay`, which are the references. A
chunk of BT tokens is a few matrix products; the state passes from chunk to chunk. The log decay g
has one number for each head and token (GATE 1), one for each channel of the keys (GATE 2), or is
absent (GATE 0). With GATE 2, exp(G_i - G_j) is split into two factors relative to the middle of the
chunk. So BT times the largest -g must not be above 160.

Shapes: q [batch, kv_heads * GROUPS, time, K], k [batch, kv_heads, time, K], v [.., V], g [batch,
kv_heads, time] or [.., K]. Strides are arbitrary, except that of the last dimension, which is 1. o
[batch, time, heads, V]; states [sequences, kv_heads, K, V] in fp32. With VARLEN the batch is 1, and
`starts` [sequences + 1] says where the packed sequences begin and end. States before each chunk are
stored at h[slot + number of the chunk, kv_heads, K, V]. The slots of a sequence begin at `start //
BT + its number`: this leaves room for all chunks, and depends on no tensor's values.

Loads are widened to fp32 at once, and narrowed only as operands of a matrix product.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def sequence(n, starts, T, BT: tl.constexpr, VARLEN: tl.constexpr):
    """Of sequence n: its row of the batch, its first token there, its length, its first slot."""
    if VARLEN:
        first = tl.load(starts + n).to(tl.int64)
        length = (tl.load(starts + n + 1) - first).to(tl.int32)
        row = n * 0
        slot = first // BT + n
    else:
        first = (n * 0).to(tl.int64)
        length = T
        row = n
        slot = n * tl.cdiv(T, BT)
    return row.to(tl.int64), first, length, slot.to(tl.int64)


@triton.jit
def beginnings(
    q, k, v, g, row, first, query_head, head,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, g_b, g_h, g_t,
):  # fmt: skip
    """Where the tokens of a sequence begin, for a query head and its key-value head."""
    q += row * q_b + first * q_t + query_head * q_h
    k += row * k_b + first * k_t + head * k_h
    v += row * v_b + first * v_t + head * v_h
    g += row * g_b + first * g_t + head * g_h
    return q, k, v, g


@triton.jit
def tile(pointer, rows, stride, columns, row_mask, size: tl.constexpr):
    """Rows of a tensor in fp32, and zeros outside."""
    mask = row_mask[:, None] & (columns < size)[None, :]
    values = tl.load(pointer + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)
    return values.to(tl.float32)


@triton.jit
def state_tile(pointer, index, k, v, K: tl.constexpr, V: tl.constexpr):
    """The pointers and the mask of a block of a state."""
    at = pointer + index * K * V + k[:, None] * V + v[None, :]
    return at, (k < K)[:, None] & (v < V)[None, :]


@triton.jit
def log_decay(g, rows, stride, k, row_mask, BT: tl.constexpr, K: tl.constexpr, GATE: tl.constexpr):
    """The log decays of a chunk: [BT, 1], or [BT, BK] with one for each channel."""
    if GATE == 2:
        gates = tile(g, rows, stride, k, row_mask, K)
    elif GATE == 1:
        gates = tile(g, rows, stride, tl.arange(0, 1), row_mask, 1)
    else:
        gates = tl.zeros([BT, 1], dtype=tl.float32)
    return gates


@triton.jit
def decays(g, rows, stride, k, row_mask, BT: tl.constexpr, K: tl.constexpr, GATE: tl.constexpr):
    """The log decays of a chunk added up to each token, like `log_decay`, and over all [1, ..]."""
    each = log_decay(g, rows, stride, k, row_mask, BT, K, GATE)
    return tl.cumsum(each, axis=0), tl.sum(each, axis=0)[None, :]


@triton.jit
def between(G, low):
    """exp(G_i - G_j) of one gate for each head, where `low`; G [BT, 1]."""
    return tl.where(low, tl.exp(tl.where(low, G - tl.trans(G), 0.0)), 0.0)


@triton.jit
def scores(q, k, G, Gn, low, DT: tl.constexpr, GATE: tl.constexpr, PRECISION: tl.constexpr):
    """q_i . k_j with what fades between them, of the channels given: [BT, BT], not yet masked.

    With GATE 1 the decays, which all channels share, are left out.
    """
    if GATE == 2:
        rise, fall = tl.exp(G - 0.5 * Gn), tl.exp(0.5 * Gn - G)
        products = tl.dot((q * rise).to(DT), tl.trans((k * fall).to(DT)), input_precision=PRECISION)
    else:
        products = tl.dot(q.to(DT), tl.trans(k.to(DT)), input_precision=PRECISION)
    return products


@triton.jit
def faded(A, G, low, GATE: tl.constexpr):
    """Scores with everything above the diagonal dropped, and with the decays of GATE 1."""
    if GATE == 1:
        A = A * between(G, low)
    return tl.where(low, A, 0.0)


@triton.jit
def read_chunk(
    q, o, b_k, written, S, G, Gn, low, t, here, ck, cv, scale, q_h, q_t, o_h, o_t,
    GROUPS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, GATE: tl.constexpr, DT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Store what the queries of a chunk read: of its own tokens, which have `written` [BT, BV] at
    the keys b_k, and of the state before it.
    """
    for r in range(GROUPS):
        b_q = tile(q + r * q_h, t, q_t, ck, here, K) * scale
        A = faded(scores(b_q, b_k, G, Gn, low, DT, GATE, PRECISION), G, low, GATE)
        b_o = tl.dot(A.to(DT), written, input_precision=PRECISION)
        b_o = tl.dot((b_q * tl.exp(G)).to(DT), S.to(DT), acc=b_o, input_precision=PRECISION)
        tl.store(
            o + r * o_h + t[:, None] * o_t + cv[None, :], b_o.to(o.dtype.element_ty),
            mask=here[:, None] & (cv < V)[None, :],
        )  # fmt: skip


@triton.jit
def after_chunk(S, b_k, written, G, Gn, DT: tl.constexpr, PRECISION: tl.constexpr):
    """The state after a chunk, of which tokens have `written` at the keys b_k."""
    last = tl.trans((b_k * tl.exp(Gn - G)).to(DT))
    return S * tl.trans(tl.exp(Gn)) + tl.dot(last, written, input_precision=PRECISION)


@triton.jit
def scan(
    q, k, v, g, o, h, start, end, starts, scale, T,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, g_b, g_h, g_t, o_b, o_h, o_t,
    H: tl.constexpr, GROUPS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, GATE: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DT: tl.constexpr,
    HAS_START: tl.constexpr, STORE_O: tl.constexpr, STORE_H: tl.constexpr, STORE_END: tl.constexpr,
    VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Chunk by chunk; grid (blocks of V, blocks of K, sequences * kv_heads).

    Writes the output (which needs all channels, BK >= K), the states before each chunk, or both.
    """
    i_v, i_k, i_nh = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n, head = i_nh // H, i_nh % H
    row, first, length, slot = sequence(n, starts, T, BT, VARLEN)
    ck, cv, ot = i_k * BK + tl.arange(0, BK), i_v * BV + tl.arange(0, BV), tl.arange(0, BT)
    low = ot[:, None] >= ot[None, :]
    q, k, v, g = beginnings(
        q, k, v, g, row, first, head * GROUPS, head,
        q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, g_b, g_h, g_t,
    )  # fmt: skip
    o += row * o_b + first * o_t + head * GROUPS * o_h

    S = tl.zeros([BK, BV], dtype=tl.float32)
    if HAS_START:
        at, inside = state_tile(start, i_nh.to(tl.int64), ck, cv, K, V)
        S += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    for i in range(tl.cdiv(length, BT)):
        if STORE_H:
            before, inside = state_tile(h, (slot + i) * H + head, ck, cv, K, V)
            tl.store(before, S.to(h.dtype.element_ty), mask=inside)
        t = i * BT + ot
        here = t < length
        b_k = tile(k, t, k_t, ck, here, K)
        b_v = tile(v, t, v_t, cv, here, V).to(DT)
        G, Gn = decays(g, t, g_t, ck, here, BT, K, GATE)
        if STORE_O:
            read_chunk(
                q, o, b_k, b_v, S, G, Gn, low, t, here, ck, cv, scale, q_h, q_t, o_h, o_t,
                GROUPS, K, V, GATE, DT, PRECISION,
            )  # fmt: skip
        S = after_chunk(S, b_k, b_v, G, Gn, DT, PRECISION)
    if STORE_END:
        at, inside = state_tile(end, i_nh.to(tl.int64), ck, cv, K, V)
        tl.store(at, S, mask=inside)


@triton.jit
def read(
    q, k, v, g, o, h, starts, scale, T,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, g_b, g_h, g_t, o_b, o_h, o_t,
    H: tl.constexpr, GROUPS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, GATE: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DT: tl.constexpr,
    VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the output from the states before each chunk, for all chunks at once.

    The grid is (blocks of V, chunks, sequences * heads). Channels of the keys are read block by
    block, for heads whose state is too large to stay in registers.
    """
    i_v, i, i_nh = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n, query_head = i_nh // (H * GROUPS), i_nh % (H * GROUPS)
    head = query_head // GROUPS
    row, first, length, slot = sequence(n, starts, T, BT, VARLEN)
    if i * BT >= length:
        return
    cv, ot = i_v * BV + tl.arange(0, BV), tl.arange(0, BT)
    low = ot[:, None] >= ot[None, :]
    t = i * BT + ot
    here = t < length
    q, k, v, g = beginnings(
        q, k, v, g, row, first, query_head, head,
        q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, g_b, g_h, g_t,
    )  # fmt: skip
    o += row * o_b + first * o_t + query_head * o_h

    A = tl.zeros([BT, BT], dtype=tl.float32)
    b_o = tl.zeros([BT, BV], dtype=tl.float32)
    for j in range(tl.cdiv(K, BK)):
        ck = j * BK + tl.arange(0, BK)
        b_q = tile(q, t, q_t, ck, here, K) * scale
        b_k = tile(k, t, k_t, ck, here, K)
        G, Gn = decays(g, t, g_t, ck, here, BT, K, GATE)
        at, inside = state_tile(h, (slot + i) * H + head, ck, cv, K, V)
        S = tl.load(at, mask=inside, other=0.0)
        A += scores(b_q, b_k, G, Gn, low, DT, GATE, PRECISION)
        b_o = tl.dot((b_q * tl.exp(G)).to(DT), S.to(DT), acc=b_o, input_precision=PRECISION)
    one = log_decay(g, t, g_t, tl.arange(0, 1), here, BT, 1, GATE)
    A = faded(A, tl.cumsum(one, axis=0), low, GATE)
    b_v = tile(v, t, v_t, cv, here, V)
    b_o = tl.dot(A.to(DT), b_v.to(DT), acc=b_o, input_precision=PRECISION)
    tl.store(
        o + t[:, None] * o_t + cv[None, :], b_o.to(o.dtype.element_ty),
        mask=here[:, None] & (cv < V)[None, :],
    )  # fmt: skip


def strides(x: Tensor | None) -> tuple[int, int, int]:
    """Return the strides of batch, heads and time; the last dimension must be contiguous."""
    if x is None:
        return 0, 0, 0
    assert x.dim() == 3 or x.shape[-1] == 1 or x.stride(-1) == 1
    return x.stride(0), x.stride(1), x.stride(2)


def kind_of_gate(g: Tensor | None) -> int:
    """Return 0 without a gate, 1 for one number for each head, 2 for one for each channel."""
    return 0 if g is None else g.dim() - 2


def sequences_of(k: Tensor, starts: Tensor | None) -> int:
    """Return the number of sequences: rows of the batch, or packed ones."""
    return k.shape[0] if starts is None else starts.shape[0] - 1


def slots_of(k: Tensor, starts: Tensor | None, size: int) -> int:
    """Return the number of slots for the states of all chunks of `size` tokens."""
    if starts is None:
        chunks: int = triton.cdiv(k.shape[2], size)
        return k.shape[0] * chunks
    return k.shape[2] // size + starts.shape[0] - 1


def chunk_states(
    k: Tensor, v: Tensor, g: Tensor | None, start: Tensor | None, starts: Tensor | None,
    tiles: dict[str, Any], dtype: torch.dtype, precision: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute the states before each chunk [slots, kv_heads, K, V], and the last ones in fp32."""
    K, V = k.shape[3], v.shape[3]
    h = k.new_empty(slots_of(k, starts, tiles["BT"]), k.shape[1], K, V, dtype=dtype)
    end = k.new_empty(sequences_of(k, starts), k.shape[1], K, V, dtype=torch.float32)
    _scan(k, k, v, g, None, h, start, end, starts, 1.0, 1, tiles, precision)
    return h, end


def forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, start: Tensor | None, starts: Tensor | None,
    scale: float, tiles: dict[str, dict[str, Any]], precision: str = "ieee",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute the output [batch, time, heads, V] and the last state [sequences, kv_heads, K, V].

    `tiles` has the blocks of the kernel `scan`, which is one launch, or of `states` and `read`,
    which share their BT.
    """
    groups = q.shape[1] // k.shape[1]
    o = v.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])
    if "scan" in tiles:
        shape = sequences_of(k, starts), k.shape[1], k.shape[3], v.shape[3]
        end = k.new_empty(shape, dtype=torch.float32)
        out = o.transpose(1, 2)
        _scan(q, k, v, g, out, None, start, end, starts, scale, groups, tiles["scan"], precision)
        return o, end
    h, end = chunk_states(k, v, g, start, starts, tiles["states"], k.dtype, precision)
    size = tiles["read"]
    grid = (
        triton.cdiv(v.shape[3], size["BV"]),
        triton.cdiv(k.shape[2], size["BT"]),
        sequences_of(k, starts) * q.shape[1],
    )
    read[grid](
        q, k, v, k if g is None else g, o, h, k if starts is None else starts, scale, k.shape[2],
        *strides(q), *strides(k), *strides(v), *strides(g), *strides(o.transpose(1, 2)),
        H=k.shape[1], GROUPS=groups, K=k.shape[3], V=v.shape[3], GATE=kind_of_gate(g),
        DT=number_type(k), VARLEN=starts is not None, PRECISION=precision, **size,
    )  # fmt: skip
    return o, end


def _scan(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, o: Tensor | None, h: Tensor | None,
    start: Tensor | None, end: Tensor | None, starts: Tensor | None, scale: float, groups: int,
    tiles: dict[str, Any], precision: str,
) -> None:  # fmt: skip
    K, V, heads = k.shape[3], v.shape[3], k.shape[1]
    grid = (
        triton.cdiv(V, tiles["BV"]),
        triton.cdiv(K, tiles["BK"]),
        sequences_of(k, starts) * heads,
    )
    assert o is None or grid[1] == 1
    scan[grid](
        *(k if x is None else x for x in (q, k, v, g, o, h, start, end, starts)),
        scale, k.shape[2],
        *strides(q), *strides(k), *strides(v), *strides(g), *strides(o),
        H=heads, GROUPS=groups, K=K, V=V, GATE=kind_of_gate(g), DT=number_type(k),
        HAS_START=start is not None, STORE_O=o is not None, STORE_H=h is not None,
        STORE_END=end is not None, VARLEN=starts is not None, PRECISION=precision, **tiles,
    )  # fmt: skip


def number_type(x: Tensor) -> Any:
    """Return Triton's type for the dtype of a tensor."""
    return {
        torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16,
    }[x.dtype]  # fmt: skip
