"""Rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("reroll::rope", mutates_args=())
def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Apply the rotary position embedding (Su et al., 2021, arXiv 2104.09864, equation 34).

    `cos` and `sin` broadcast to `x` in all but the last dimension. Its size R is the number of
    leading channels of `x` that are rotated; the rest stay unchanged. Channel pairs are (i, i +
    R/2), or (2i, 2i + 1) when `interleaved`.
    """
    size = cos.shape[-1]
    turned, rest = x[..., :size], x[..., size:]
    if interleaved:
        quarter = torch.stack((-turned[..., 1::2], turned[..., ::2]), dim=-1).flatten(-2)
    else:
        quarter = torch.cat((-turned[..., size // 2 :], turned[..., : size // 2]), dim=-1)
    turned = turned * cos + quarter * sin
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned.contiguous()


@rope.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


ROPE = torch.ops.reroll.rope.default
