"""What launching kernels needs in every bundle. This file is copied into bundles."""

from __future__ import annotations

import os
from typing import Any

import torch
import triton

# the bundle has its own
ARCHS: tuple[str, ...] = ("sm_90",)


def architecture() -> str:
    """Whose block sizes to take: those of the nearest older GPU that the bundle has."""
    if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        return ARCHS[0]
    if torch.version.hip:
        wanted = "gfx942"
    else:
        major, _ = torch.cuda.get_device_capability()
        wanted = "sm_80" if major < 9 else "sm_90" if major < 10 else "sm_100"
    return wanted if wanted in ARCHS else ARCHS[0]


def tiles_of(table: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The block sizes for this GPU."""
    return table[architecture()]


def strides(x: Any) -> tuple[int, int, int]:
    """Of rows, heads and time."""
    return (0, 0, 0) if x is None else (x.stride(0), x.stride(1), x.stride(2))


def together(*tensors: Any) -> list[Any]:
    """The tensors with their last dimension in one piece, as the kernels read them."""
    return [x if x is None or x.stride(-1) == 1 else x.contiguous() for x in tensors]


def launch_near(
    kernel: Any,
    tiles: Any,
    q: Any,
    k: Any,
    v: Any,
    scale: Any,
    window: Any,
    prefix: Any,
    first: Any,
) -> Any:
    """Attention over a prompt, [rows, time, heads, V], in one launch; see the kernel."""
    rows, heads, time, _ = q.shape
    o = v.new_empty(rows, time, heads, v.shape[3])
    q, k, v = together(q, k, v)
    kernel[(triton.cdiv(time, tiles["BM"]), rows * heads)](
        q, k, v, q, first.contiguous(), o, scale, window or time, prefix, time,
        *strides(q), *strides(k), *strides(v), 0, 0, 0, *strides(o.transpose(1, 2)), **tiles,
    )  # fmt: skip
    return o


def launch_step(
    kernel: Any, tiles: Any, q: Any, k: Any, v: Any, g: Any, beta: Any, state: Any, slots: Any
) -> Any:
    """One token for each row; see the kernel."""
    (rows, heads, _), columns = k.shape, v.shape[2]
    o = v.new_empty(rows, q.shape[1], columns)
    q, k, v, g = together(q, k, v, g)
    kernel[(triton.cdiv(columns, tiles["BV"]), rows * heads)](
        q, k, v, state if g is None else g, state if beta is None else beta, state, state, state,
        slots, o, 1.0, 1.0, 0.0, *strides(q)[:2], *strides(k)[:2], *strides(v)[:2],
        *((0, 0) if g is None else (g.stride(0), g.stride(1))),
        *((0, 0) if beta is None else (beta.stride(0), beta.stride(1))),
        o.stride(0), o.stride(1), **tiles,
    )  # fmt: skip
    return o


def launch_convolution(kernel: Any, tiles: Any, x: Any, weight: Any, bias: Any) -> Any:
    """A prompt [rows, channels, time] from its first token, and its last inputs; see the kernel."""
    (rows, channels, time), size = x.shape, weight.shape[1]
    y = x.new_empty(rows, time, channels).transpose(1, 2)
    end = x.new_empty(rows, channels, size - 1)
    grid = triton.cdiv(channels, tiles["BC"]), triton.cdiv(time, tiles["BM"]), rows
    kernel[grid](
        x, weight, x if bias is None else bias, x, y, end, time,
        *x.stride(), *weight.stride(), *y.stride(), **tiles,
    )  # fmt: skip
    return y, end


def launch_convolution_step(
    kernel: Any, tiles: Any, x: Any, weight: Any, bias: Any, state: Any, slots: Any
) -> Any:
    """One token [rows, channels] of each row, whose state moves on in place; see the kernel."""
    rows, channels = x.shape
    y = x.new_empty(rows, channels)
    kernel[(triton.cdiv(channels, tiles["BC"]), rows)](
        x, weight, x if bias is None else bias, state, slots, y,
        *x.stride(), *weight.stride(), y.stride(0), **tiles,
    )  # fmt: skip
    return y
