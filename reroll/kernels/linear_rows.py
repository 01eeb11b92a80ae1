"""Triton kernel: linear layers of a few rows, as in decoding, fused with adjacent operations.

These are an RMS norm before, a low-rank residual, and a gated linear unit behind:

    n = x / sqrt(mean(x^2) + eps) (gain + offset)        or x, without a norm
    y = n W^T + b + (n A^T) B^T                          without the last term if there is no A, B
    y = act(y_gate) y_up                                 with a second set of weights

A decoding step reads each weight once and computes very little, so separate launches would dominate
its time: here all is one launch. Rows are scaled after the product, so the norm needs no separate
pass over x. The product of x and gain is rounded to the operands' dtype where PyTorch rounds n. It
may overflow fp16, which therefore has no tiles. With one depth for all rows, the low-rank residual
is that of `depth_lora` without sorting.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from reroll.kernels.diagonal import number_type

# rows of one tile; with more rows, weights are read once for each tile
ROWS = 16
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


class Norm(NamedTuple):
    """An RMS norm: gain [K] or None, and the numbers added to the mean square and to the gain."""

    gain: Tensor | None
    eps: float
    offset: float = 0.0


class Linear(NamedTuple):
    """Weight [N, K], bias [N], down [R, K] and up [N, R]; the last three may be None."""

    weight: Tensor
    bias: Tensor | None = None
    down: Tensor | None = None
    up: Tensor | None = None


def linear_rows_reference(
    x: Tensor, norm: Norm | None, layers: tuple[Linear, ...], activation: str = ""
) -> Tensor:
    """Compute the definition in fp32, for x [rows, K].

    `layers` are one layer, or the gate and the other half of a gated linear unit.
    """
    x = x.float()
    if norm is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps)
        x = x if norm.gain is None else x * (norm.gain.float() + norm.offset)
    outs = []
    for weight, bias, down, up in layers:
        y = F.linear(x, weight.float(), None if bias is None else bias.float())
        if down is not None and up is not None:
            y = y + (x @ down.float().T) @ up.float().T
        outs.append(y)
    if len(outs) == 1:
        return outs[0]
    gate, other = outs
    if activation == "gelu_tanh":
        return F.gelu(gate, approximate="tanh") * other
    result: Tensor = getattr(F, activation)(gate) * other
    return result


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """The activation of this name; tanh(u) is 2 sigmoid(2 u) - 1."""
    if ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        x = tl.maximum(x, 0.0)
    return x


@triton.jit
def weight_tile(pointer, row, column, inside, DT: tl.constexpr, size: tl.constexpr):
    """The transpose of a block of a matrix whose rows are `size` long: [columns, rows]."""
    at = pointer + row[None, :].to(tl.int64) * size + column[:, None]
    return tl.load(at, mask=inside[None, :] & (column < size)[:, None], other=0.0).to(DT)


@triton.jit
def finished_layer(
    acc, low, factor, bias, up, on, in_n,
    R: tl.constexpr, NORM: tl.constexpr, HAS_BIAS: tl.constexpr, DT: tl.constexpr,
    BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A layer's products, of rows that were not divided by their norm, with all that is missing."""
    if NORM:
        acc = acc * factor
    if R > 0:
        if NORM:
            low = low * factor
        b_up = weight_tile(up, on, tl.arange(0, BR), in_n, DT, R)
        acc = tl.dot(low.to(DT), b_up, acc=acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias + on, mask=in_n, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def linear_rows_tile(
    x, gain, weight, bias, down, up, weight_2, bias_2, down_2, up_2, y, rows, N, x_m, y_m,
    eps, offset, K: tl.constexpr, R: tl.constexpr, NORM: tl.constexpr, HAS_GAIN: tl.constexpr,
    HAS_BIAS: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, DT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of N, blocks of rows)."""
    i_n, i_m = tl.program_id(0), tl.program_id(1)
    om, on, orank = i_m * BM + tl.arange(0, BM), i_n * BN + tl.arange(0, BN), tl.arange(0, BR)
    here, in_n, in_r = om < rows, on < N, orank < R
    acc = tl.zeros([BM, BN], dtype=tl.float32)
    other = tl.zeros([BM, BN], dtype=tl.float32)
    low = tl.zeros([BM, BR], dtype=tl.float32)
    low_2 = tl.zeros([BM, BR], dtype=tl.float32)
    squares = tl.zeros([BM], dtype=tl.float32)
    for j in range(tl.cdiv(K, BK)):
        ok = j * BK + tl.arange(0, BK)
        inside = here[:, None] & (ok < K)[None, :]
        wide = tl.load(x + om[:, None] * x_m + ok[None, :], mask=inside, other=0.0).to(tl.float32)
        if NORM:
            squares += tl.sum(wide * wide, axis=1)
            if HAS_GAIN:
                b_gain = tl.load(gain + ok, mask=ok < K, other=0.0).to(tl.float32) + offset
                wide = wide * b_gain[None, :]
        b_x = wide.to(DT)
        b_w = weight_tile(weight, on, ok, in_n, DT, K)
        acc = tl.dot(b_x, b_w, acc=acc, input_precision=PRECISION)
        if R > 0:
            b_down = weight_tile(down, orank, ok, in_r, DT, K)
            low = tl.dot(b_x, b_down, acc=low, input_precision=PRECISION)
        if GATED:
            b_w = weight_tile(weight_2, on, ok, in_n, DT, K)
            other = tl.dot(b_x, b_w, acc=other, input_precision=PRECISION)
            if R > 0:
                b_down = weight_tile(down_2, orank, ok, in_r, DT, K)
                low_2 = tl.dot(b_x, b_down, acc=low_2, input_precision=PRECISION)
    factor = squares[:, None]
    if NORM:
        factor = tl.rsqrt(factor / K + eps)
    acc = finished_layer(acc, low, factor, bias, up, on, in_n, R, NORM, HAS_BIAS, DT, BR, PRECISION)
    if GATED:
        other = finished_layer(
            other, low_2, factor, bias_2, up_2, on, in_n, R, NORM, HAS_BIAS, DT, BR, PRECISION
        )
        acc = activated(acc, ACTIVATION) * other
    tl.store(
        y + om[:, None] * y_m + on[None, :], acc.to(y.dtype.element_ty),
        mask=here[:, None] & in_n[None, :],
    )  # fmt: skip


def linear_rows(
    x: Tensor, norm: Norm | None, layers: tuple[Linear, ...], activation: str = "", *,
    tiles: dict[str, Any], precision: str = "ieee",
) -> Tensor:  # fmt: skip
    """Compute `linear_rows_reference`; `tiles` has BM, BN, BK."""
    first, second = layers[0], layers[-1]
    (rows, inputs), outputs = x.shape, first.weight.shape[0]
    rank = 0 if first.down is None else first.down.shape[0]
    y = x.new_empty(rows, outputs)
    gain = None if norm is None else norm.gain
    pointers = (x if t is None else t for t in (gain, *first, *second))
    linear_rows_tile[(triton.cdiv(outputs, tiles["BN"]), triton.cdiv(rows, tiles["BM"]))](
        x, *pointers, y, rows, outputs, x.stride(0), y.stride(0),
        0.0 if norm is None else norm.eps, 0.0 if norm is None else norm.offset,
        K=inputs, R=rank, NORM=norm is not None, HAS_GAIN=gain is not None,
        HAS_BIAS=first.bias is not None, GATED=len(layers) == 2, ACTIVATION=activation,
        DT=number_type(x), BR=max(16, triton.next_power_of_2(rank)), PRECISION=precision, **tiles,
    )  # fmt: skip
    return y
