"""Kernels of single layers as PyTorch ops, for inference.

These are a linear layer whose rows are at different depths, and the confidence of a head. They are
in the namespace of the ops of `recurrence`, have fake forms for `torch.compile`, and no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reroll.errors import UsageError
from reroll.kernels import configurations, forms
from reroll.kernels.confidence import confidence as confidence_kernel
from reroll.kernels.depth_lora import depth_lora as depth_lora_kernel
from reroll.kernels.recurrence import NAMESPACE


@torch.library.custom_op(f"{NAMESPACE}::depth_lora", mutates_args=())
def depth_lora(
    x: Tensor,
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    order: Tensor,
    table: Tensor,
    precision: str,
) -> Tensor:
    """Compute a linear layer with the low-rank residual of each row's depth d.

    x W^T + (x A_d^T) B_d^T, with `x` [rows, K], `weight` [N, K], `down` [depths, R, K], `up`
    [depths, N, R]. `order` and `table` are `depth_lora.tiles_by_depth` of the rows' depths with
    tiles of `depth_lora.ROWS` rows. `precision` of products in fp32: `ieee` or `tf32`.

    Returns [rows, N] in the dtype of x. Raises UsageError if the manifest has no tiles.
    """
    tiles = configurations.depth_tiles(_target(x), x.dtype, precision, down.shape[1])
    if tiles is None:
        raise _no_tiles("depth_lora", x)
    x, weight, down, up = (t.contiguous() for t in (x, weight, down, up))
    return depth_lora_kernel(x, weight, down, up, order, table, tiles, precision)


@depth_lora.register_fake
def _(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op(f"{NAMESPACE}::confidence", mutates_args=())
def confidence(
    hidden: Tensor, weight: Tensor, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the confidence of a head without its logits: see `confidence.Confidence`.

    `hidden` [rows, K], `weight` [vocabulary, K]. Returns the highest probability, its lead, the
    entropy in nats (fp32) and the token (int64), [rows] each. Raises UsageError if the manifest has
    no tiles.
    """
    tiles = configurations.vocabulary_tiles(_target(hidden), hidden.dtype, precision)
    if tiles is None:
        raise _no_tiles("confidence", hidden)
    result = confidence_kernel(hidden.contiguous(), weight.contiguous(), tiles, precision=precision)
    return result.highest, result.lead, result.entropy, result.token


@confidence.register_fake
def _(hidden: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def number(dtype: torch.dtype) -> Tensor:
        return hidden.new_empty(hidden.shape[0], dtype=dtype)

    wide = torch.float32
    return number(wide), number(wide), number(wide), number(torch.int64)


def rejects(kernel: str, x: Tensor, rank: int = 0) -> str:
    """Return why a kernel of this file does not run on such tensors; empty if it does."""
    where = _target(x), x.dtype, forms.precision()
    if kernel == "confidence":
        tiles = configurations.vocabulary_tiles(*where)
    else:
        tiles = configurations.depth_tiles(*where, rank)
    return "" if tiles else f"the manifest has no tiles for {x.dtype}, rank {rank}"


def _target(x: Tensor) -> str:
    return configurations.target(x.device)


def _no_tiles(kernel: str, x: Tensor) -> UsageError:
    return UsageError(
        f"no tiles for {x.dtype}",
        where=f"kernel {kernel}",
        hint="reroll.kernels.dispatch.runs says whether there are",
    )
