"""Triton kernels: RMS norm, rotary embedding, and the product of a gated linear unit.

Each reads its inputs once and writes once; PyTorch needs a launch, and a pass over memory, for each
operation in them. The references are the ops `reroll::rms_norm`, `reroll::rope` and `reroll::glu`.
They compute in fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from reroll.kernels.linear_rows import activated

# elements in a program of `glu_part`, and vectors in a program of `rope_part`
BLOCK, VECTORS = 1024, 8


@triton.jit
def norm_row(
    x, gain, y, eps, offset, D: tl.constexpr, BD: tl.constexpr, HAS_GAIN: tl.constexpr
):  # fmt: skip
    """One row of D for each program."""
    at, column = tl.program_id(0).to(tl.int64) * D, tl.arange(0, BD)
    inside = column < D
    wide = tl.load(x + at + column, mask=inside, other=0.0).to(tl.float32)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / D + eps)
    if HAS_GAIN:
        wide *= tl.load(gain + column, mask=inside, other=0.0).to(tl.float32) + offset
    tl.store(y + at + column, wide.to(y.dtype.element_ty), mask=inside)


@triton.jit
def rope_part(
    x, cos, sin, y, count, H, T, x_b, x_h, x_t, c_b, c_h, c_t, s_b, s_h, s_t, y_b, y_h, y_t,
    D: tl.constexpr, SIZE: tl.constexpr, INTERLEAVED: tl.constexpr, BM: tl.constexpr,
    BH: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """BM vectors of D for each program; the first SIZE channels turn, in pairs."""
    n = tl.program_id(0) * BM + tl.arange(0, BM)
    here = (n < count)[:, None]
    b, h, t = (n // (H * T)).to(tl.int64), n // T % H, n % T
    x += (b * x_b + h * x_h + t * x_t)[:, None]
    cos += (b * c_b + h * c_h + t * c_t)[:, None]
    sin += (b * s_b + h * s_h + t * s_t)[:, None]
    y += (b * y_b + h * y_h + t * y_t)[:, None]
    pair = tl.arange(0, BH)[None, :]
    if INTERLEAVED:
        first, second = 2 * pair, 2 * pair + 1
    else:
        first, second = pair, pair + SIZE // 2
    keep = here & (pair < SIZE // 2)
    a = tl.load(x + first, mask=keep, other=0.0).to(tl.float32)
    c = tl.load(x + second, mask=keep, other=0.0).to(tl.float32)
    cos_a = tl.load(cos + first, mask=keep, other=0.0).to(tl.float32)
    sin_a = tl.load(sin + first, mask=keep, other=0.0).to(tl.float32)
    cos_c = tl.load(cos + second, mask=keep, other=0.0).to(tl.float32)
    sin_c = tl.load(sin + second, mask=keep, other=0.0).to(tl.float32)
    tl.store(y + first, (a * cos_a - c * sin_a).to(y.dtype.element_ty), mask=keep)
    tl.store(y + second, (c * cos_c + a * sin_c).to(y.dtype.element_ty), mask=keep)
    if SIZE < D:
        rest = SIZE + tl.arange(0, BD)[None, :]
        still = here & (rest < D)
        tl.store(y + rest, tl.load(x + rest, mask=still, other=0.0), mask=still)


@triton.jit
def glu_part(gate, up, y, count, ACTIVATION: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """BLOCK_SIZE elements for each program."""
    at = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    inside = at < count
    wide = activated(tl.load(gate + at, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
    wide *= tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, wide.to(y.dtype.element_ty), mask=inside)


def norm(x: Tensor, gain: Tensor | None, eps: float, offset: float = 0.0) -> Tensor:
    """RMS norm of the last dimension."""
    x = x.contiguous()
    y, size = torch.empty_like(x), x.shape[-1]
    block = triton.next_power_of_2(size)
    norm_row[(x.numel() // size,)](
        x, x if gain is None else gain, y, eps, offset,
        D=size, BD=block, HAS_GAIN=gain is not None, num_warps=4 if block <= 4096 else 8,
    )  # fmt: skip
    return y


def turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotary embedding of x [batch, heads, time, D]; cos and sin [.., .., time, size]."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    (rows, heads, time, width), size = x.shape, cos.shape[-1]
    cos, sin = (t.expand(rows, heads, time, size) for t in (cos.contiguous(), sin.contiguous()))
    y = torch.empty_like(x)
    count = rows * heads * time
    rope_part[(triton.cdiv(count, VECTORS),)](
        x, cos, sin, y, count, heads, time,
        *x.stride()[:3], *cos.stride()[:3], *sin.stride()[:3], *y.stride()[:3],
        D=width, SIZE=size, INTERLEAVED=interleaved, BM=VECTORS,
        BH=triton.next_power_of_2(max(size // 2, 1)),
        BD=triton.next_power_of_2(max(width - size, 1)), num_warps=4,
    )  # fmt: skip
    return y


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate) up."""
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    glu_part[(triton.cdiv(gate.numel(), BLOCK),)](
        gate, up, y, gate.numel(), ACTIVATION=activation, BLOCK_SIZE=BLOCK, num_warps=4
    )
    return y
