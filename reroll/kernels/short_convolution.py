"""Triton kernels: short convolutions over time, one filter for each channel.

y_t = b + sum_j w_j x_{t-K+1+j}, j = 0 ... K-1. The state is the last K - 1 inputs. The reference is
the op `reroll::short_convolution`, behind the inputs that the state holds. A program of a prompt
has some channels of some tokens, and reads each input K times, mostly from the cache of the
processor. One of a step has some channels, and moves their state on by one token in place. They sum
in fp32.

Shapes: x [batch, channels, time] and weight [channels, K] with any strides, bias [channels], states
[batch or slots, channels, K - 1] in one piece, in the dtype of x.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def convolved_input(
    x, start, at, t, c, inside, T, x_t, KEPT: tl.constexpr, HAS_START: tl.constexpr
):
    """Inputs of the tokens `t`, in fp32: those before the first are in `start`, or are zeros.

    `at` are the places of the channels `c` in x, `inside` which channels there are.
    """
    new = tl.load(x + at + t * x_t, mask=inside & (t >= 0) & (t < T), other=0.0).to(tl.float32)
    if HAS_START:
        old = tl.load(start + c * KEPT + t + KEPT, mask=inside & (t < 0), other=0.0)
        new += old.to(tl.float32)
    return new


@triton.jit
def short_convolution_part(
    x, weight, bias, start, y, end, T, x_b, x_c, x_t, w_c, w_k, y_b, y_c, y_t,
    C: tl.constexpr, K: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_START: tl.constexpr,
    BC: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """BC channels of BM tokens; grid (blocks of channels, blocks of tokens, rows)."""
    i_t, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    c = (tl.program_id(0) * BC + tl.arange(0, BC))[None, :]
    t = (i_t * BM + tl.arange(0, BM))[:, None]
    inside, at = c < C, row * x_b + c * x_c
    start += row * C * (K - 1)
    sums = tl.zeros([BM, BC], dtype=tl.float32)
    if HAS_BIAS:
        sums += tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    for j in tl.static_range(K):
        w = tl.load(weight + c * w_c + j * w_k, mask=inside, other=0.0).to(tl.float32)
        sums += w * convolved_input(
            x, start, at, t + (j - K + 1), c, inside, T, x_t, K - 1, HAS_START
        )  # fmt: skip
    tl.store(y + row * y_b + c * y_c + t * y_t, sums.to(y.dtype.element_ty),
             mask=inside & (t < T))  # fmt: skip
    if i_t == 0:
        for j in tl.static_range(K - 1):
            last = convolved_input(
                x, start, at, T + (j - K + 1), c, inside, T, x_t, K - 1, HAS_START
            )  # fmt: skip
            tl.store(end + row * C * (K - 1) + c * (K - 1) + j, last.to(end.dtype.element_ty),
                     mask=inside)  # fmt: skip


@triton.jit
def short_convolution_step(
    x, weight, bias, state, slots, y, x_b, x_c, w_c, w_k, y_b,
    C: tl.constexpr, K: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SLOTS: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """BC channels of one token; grid (blocks of channels, rows).

    A row whose slot is below 0 is left out. A thread has all the state of its channels, so it has
    read what it moves.
    """
    row = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    inside, slot = c < C, row
    if HAS_SLOTS:
        slot = tl.load(slots + row).to(tl.int64)
        if slot < 0:
            return
    state += slot * C * (K - 1) + c * (K - 1)
    new = tl.load(x + row * x_b + c * x_c, mask=inside, other=0.0)
    w = tl.load(weight + c * w_c + (K - 1) * w_k, mask=inside, other=0.0).to(tl.float32)
    sums = w * new.to(tl.float32)
    if HAS_BIAS:
        sums += tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    for j in tl.static_range(K - 1):
        old = tl.load(state + j, mask=inside, other=0.0)
        w = tl.load(weight + c * w_c + j * w_k, mask=inside, other=0.0).to(tl.float32)
        sums += w * old.to(tl.float32)
        if j > 0:
            tl.store(state + (j - 1), old, mask=inside)
    if K > 1:
        tl.store(state + (K - 2), new.to(state.dtype.element_ty), mask=inside)
    tl.store(y + row * y_b + c, sums.to(y.dtype.element_ty), mask=inside)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, start: Tensor | None, tiles: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Convolve [batch, channels, time]; return that, and the last K - 1 inputs.

    `start` are those before the first token, zeros if there are none. Channels of the output lie
    together. `tiles` has BC and BM.
    """
    (batch, channels, time), size = x.shape, weight.shape[1]
    y = x.new_empty(batch, time, channels).transpose(1, 2)
    end = x.new_empty(batch, channels, size - 1)
    grid = triton.cdiv(channels, tiles["BC"]), triton.cdiv(time, tiles["BM"]), batch
    short_convolution_part[grid](
        x, weight, *(x if t is None else t for t in (bias, start)), y, end, time,
        *x.stride(), *weight.stride(), *y.stride(),
        C=channels, K=size, HAS_BIAS=bias is not None, HAS_START=start is not None, **tiles,
    )  # fmt: skip
    return y, end


def step(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, slots: Tensor | None = None, *,
    tiles: dict[str, Any],
) -> Tensor:  # fmt: skip
    """Convolve one token [rows, channels] behind the inputs in `state`, which moves on in place.

    `slots` [rows] are the slots of the rows' states. A row with a slot below 0 changes no state,
    and its output is undefined. `tiles` has BC.
    """
    (rows, channels), size = x.shape, weight.shape[1]
    y = x.new_empty(rows, channels)
    short_convolution_step[(triton.cdiv(channels, tiles["BC"]), rows)](
        x, weight, x if bias is None else bias, state, state if slots is None else slots, y,
        *x.stride(), *weight.stride(), y.stride(0),
        C=channels, K=size, HAS_BIAS=bias is not None, HAS_SLOTS=slots is not None, **tiles,
    )  # fmt: skip
    return y
