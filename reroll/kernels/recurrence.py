"""Kernels of recurrences as PyTorch ops, in the namespace `reroll_kernels`.

They have fake forms for `torch.compile` and `torch.export`, and launch kernels with the tiles of
`configurations`. `diagonal` and `selective` have gradients. `delta` and `step` have none: they are
for inference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reroll.errors import UsageError
from reroll.kernels import configurations
from reroll.kernels.delta import delta_forward
from reroll.kernels.diagonal import forward, kind_of_gate, sequences_of
from reroll.kernels.diagonal_backward import backward
from reroll.kernels.diagonal_fused import fused_backward
from reroll.kernels.selective import forward as selective_forward
from reroll.kernels.selective_backward import backward as selective_gradients
from reroll.kernels.step import step as one_step

NAMESPACE = "reroll_kernels"
# families of kernels for the backward of `diagonal`: the first with tiles is used
BACKWARDS: tuple[str, ...] = ("diagonal_fused", "diagonal_backward")


@torch.library.custom_op(f"{NAMESPACE}::diagonal", mutates_args=())
def diagonal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    start: Tensor | None,
    starts: Tensor | None,
    scale: float,
    limit: int,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """Compute S_t = diag(exp g_t) S_{t-1} + k_t v_t^T, o_t = scale q_t S_t, in chunks on a GPU.

    `q` [batch, heads, time, K], `k` [batch, kv_heads, time, K], `v` [..., V], `g` [batch, kv_heads,
    time] or [..., K] or None, `start` [sequences, kv_heads, K, V] or None. `starts` [sequences + 1]
    int32: where packed sequences begin and end, in a batch of 1. Chunks have `limit` tokens or
    fewer. With a decay for each channel, the sum of -g in a chunk must stay below 160. `precision`
    of products in fp32: `ieee` or `tf32`.

    Returns the output [batch, time, heads, V] and the last states in fp32. Raises UsageError if the
    manifest has no tiles.
    """
    q, k, v, g, start, starts = map(_together, (q, k, v, g, start, starts))
    tiles = _tiles("diagonal", k, v, g, precision, limit)
    return forward(q, k, v, g, start, starts, scale, tiles, precision)


@diagonal.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, g: Any, start: Any, starts: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor]:
    count = sequences_of(k, starts)
    state = k.new_empty(count, k.shape[1], k.shape[3], v.shape[3], dtype=torch.float32)
    return v.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]), state


@torch.library.custom_op(f"{NAMESPACE}::diagonal_backward", mutates_args=())
def diagonal_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    start: Tensor | None,
    starts: Tensor | None,
    do: Tensor,
    d_end: Tensor,
    scale: float,
    limit: int,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of q, k, v, g (empty without one) and the first state.

    It is one launch where the manifest has tiles for that, and four elsewhere. Raises UsageError if
    it has tiles for neither.
    """
    q, k, v, g, start, starts = map(_together, (q, k, v, g, start, starts))
    do = _together(do.transpose(1, 2))
    candidates = (
        configurations.find_tiles(f, k, v, kind_of_gate(g), precision, limit) for f in BACKWARDS
    )
    tiles = next(filter(None, candidates), None)
    if tiles is None:
        raise _no_kernel("diagonal_backward", k, v, kind_of_gate(g), limit)
    run = fused_backward if "fused_back" in tiles else backward
    dq, dk, dv, dg, d_start = run(
        q, k, v, g, start, starts, do, _together(d_end), scale, tiles, precision
    )
    return dq, dk, dv, k.new_empty(0) if dg is None else dg, d_start


@diagonal_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, start: Any, starts: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    count = sequences_of(k, starts)
    state = k.new_empty(count, k.shape[1], k.shape[3], v.shape[3], dtype=torch.float32)
    by_time = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    dq, dk, dv = map(torch.empty_like, by_time)
    dg = k.new_empty(0) if g is None else g.new_empty(g.shape, dtype=torch.float32)
    return dq, dk, dv, dg, state


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.scale, ctx.limit, ctx.precision = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, do: Tensor, d_end: Tensor) -> tuple[Any, ...]:
    q, k, v, g, start, starts = ctx.saved_tensors
    dq, dk, dv, dg, d_start = diagonal_backward(
        q, k, v, g, start, starts, do, d_end, ctx.scale, ctx.limit, ctx.precision
    )
    dg = None if g is None else dg.to(g.dtype)
    return dq, dk, dv, dg, None if start is None else d_start, *(None,) * 4


diagonal.register_autograd(_gradients, setup_context=_keep)


@torch.library.custom_op(f"{NAMESPACE}::delta", mutates_args=())
def delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    start: Tensor | None,
    starts: Tensor | None,
    scale: float,
    limit: int,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """Compute the delta rule in chunks, with the arguments of `diagonal`.

    `beta` is [batch, kv_heads, time].
    """
    q, k, v, start, starts = map(_together, (q, k, v, start, starts))
    g = g if g is None or g.dim() == 3 else _together(g)
    tiles = _tiles("delta", k, v, g, precision, limit)
    return delta_forward(q, k, v, g, beta, start, starts, scale, tiles, precision)


@delta.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, g: Any, beta: Tensor, start: Any, starts: Any, *_: Any
) -> tuple[Tensor, Tensor]:
    state = k.new_empty(
        sequences_of(k, starts), k.shape[1], k.shape[3], v.shape[3], dtype=torch.float32
    )
    return v.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]), state


@torch.library.custom_op(f"{NAMESPACE}::step", mutates_args=())
def step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute one token, and return its outputs [rows, heads, V] and the new states.

    q [rows, heads, K], k, v [rows, kv_heads, ...], g and beta without time, state [rows, kv_heads,
    K, V].
    """
    q, k, v, state = map(_together, (q, k, v, state))
    g = None if g is None else g.contiguous()
    tiles_by_kernel = configurations.find_tiles(
        "step", k, v, 1 if g is None else g.dim() - 1, "ieee", 16
    )
    if tiles_by_kernel is None:
        raise _no_kernel("step", k, v, 0 if g is None else g.dim() - 1, 1)
    new = torch.empty_like(state, memory_format=torch.contiguous_format)
    tiles = tiles_by_kernel["recurrent_step"]
    out = one_step(q, k, v, g, beta, state.contiguous(), into=new, tiles=tiles)
    return out, new


@step.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, g: Any, beta: Any, state: Tensor) -> tuple[Tensor, Tensor]:
    return v.new_empty(*q.shape[:2], v.shape[2]), state.new_empty(state.shape)


@torch.library.custom_op(f"{NAMESPACE}::selective", mutates_args=())
def selective(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    rate: Tensor,
    start: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute the selective scan, S_t = exp(dt_t rate) S_{t-1} + k_t (dt_t v_t)^T, o_t = q_t S_t.

    `dt` [batch, kv_heads, time, V], `rate` [batch, kv_heads, time, K, V] with 1 in place of batch
    and time where it is the same for all tokens; the rest and the results are as in `diagonal`.
    """
    q, k, v, dt = map(_together, (q, k, v, dt))
    start = None if start is None else start.contiguous()
    return selective_forward(
        q, k, v, dt, rate, start, starts, _selective_tiles(k, v)["selective_scan"]
    )


@selective.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, dt: Any, rate: Any, start: Any, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    shape = sequences_of(k, starts), k.shape[1], k.shape[3], v.shape[3]
    out = v.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])
    return out, k.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op(f"{NAMESPACE}::selective_backward", mutates_args=())
def selective_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    rate: Tensor,
    start: Tensor | None,
    starts: Tensor | None,
    do: Tensor,
    d_end: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of q, k, v, dt, rate and the first states, in fp32."""
    q, k, v, dt, do = map(_together, (q, k, v, dt, do.transpose(1, 2)))
    start = None if start is None else start.contiguous()
    tiles = _selective_tiles(k, v)
    return selective_gradients(q, k, v, dt, rate, start, starts, do, d_end.contiguous(), tiles)


@selective_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, dt: Any, rate: Tensor, start: Any, starts: Any, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    state = sequences_of(k, starts), k.shape[1], k.shape[3], v.shape[3]
    shapes = q.shape, k.shape, v.shape, v.shape, rate.shape, state
    dq, dk, dv, d_dt, d_rate, d_start = (k.new_empty(s, dtype=torch.float32) for s in shapes)
    return dq, dk, dv, d_dt, d_rate, d_start


def _keep_selective(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _selective_gradients(ctx: Any, do: Tensor, d_end: Tensor) -> tuple[Any, ...]:
    *given, starts = ctx.saved_tensors
    grads = selective_backward(*given, starts, do, d_end)
    found = (None if x is None else g.to(x.dtype) for x, g in zip(given, grads, strict=True))
    return *found, None


selective.register_autograd(_selective_gradients, setup_context=_keep_selective)


def _selective_tiles(k: Tensor, v: Tensor) -> configurations.Tiles:
    tiles: Any = configurations.selective_tiles(configurations.target(k.device), k.shape[3])
    if tiles is None:
        raise _no_kernel("selective", k, v, 3, 1)
    return tiles  # type: ignore[no-any-return]


def _together(x: Any) -> Any:
    """Return a tensor with a contiguous last dimension, copied if necessary; None stays None."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _tiles(
    family: str, k: Tensor, v: Tensor, g: Tensor | None, precision: str, limit: int
) -> configurations.Tiles:
    # gates with one number per head need no contiguous last dimension, which is time
    tiles = configurations.find_tiles(family, k, v, kind_of_gate(g), precision, limit)
    if tiles is None:
        raise _no_kernel(family, k, v, kind_of_gate(g), limit)
    return tiles


def _no_kernel(family: str, k: Tensor, v: Tensor, gate: int, limit: int) -> UsageError:
    return UsageError(
        f"no kernel for heads of {k.shape[-1]} and {v.shape[-1]}, {k.dtype}, gate {gate}, "
        f"chunks of {limit}",
        where=f"kernel {family}",
        hint="reroll.kernels.dispatch takes another form where there is none",
    )
