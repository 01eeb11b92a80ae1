"""Additive attention mask."""

from __future__ import annotations

import torch
from torch import Tensor

from reroll.rewrite.ir.visibility import Visibility


@torch.library.custom_op("reroll::mask", mutates_args=())
def mask(
    padding: Tensor | None,
    batch: int,
    q_length: int,
    kv_length: int,
    q_offset: int,
    causal: bool,
    window: int | None,
    chunk: int | None,
    blocks: Tensor | None,
    dtype: torch.dtype,
    prefix: int | None = None,
) -> Tensor:
    """Compute the additive attention mask: 0 where a query sees a key, else the dtype's minimum.

    Query `i` has position `q_offset + i` among the keys. For the other arguments see
    `reroll.rewrite.ir.visibility`.

    Returns [batch, 1, q_length, kv_length] of `dtype`.
    """
    visibility = Visibility(causal, window, chunk, padding, blocks, prefix)
    device = padding.device if padding is not None else None
    q = torch.arange(q_length, device=device) + q_offset
    return visibility.added(q, kv_length, dtype).expand(batch, -1, -1, -1).contiguous()


@mask.register_fake
def _(
    padding: Tensor | None,
    batch: int,
    q_length: int,
    kv_length: int,
    q_offset: int,
    causal: bool,
    window: int | None,
    chunk: int | None,
    blocks: Tensor | None,
    dtype: torch.dtype,
    prefix: int | None = None,
) -> Tensor:
    device = padding.device if padding is not None else None
    return torch.empty(batch, 1, q_length, kv_length, dtype=dtype, device=device)


MASK = torch.ops.reroll.mask.default
