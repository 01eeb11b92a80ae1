"""Root-mean-square norm."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("reroll::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0) -> Tensor:
    """Compute x / sqrt(mean(x^2) + eps) * (offset + weight) over the last dimension, in fp32.

    RMS norm: Zhang and Sennrich, 2019 (arXiv 1910.07467), equation 4. `offset` is 1 where the
    stored weight is the distance from one.
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is not None:
        normed = normed * (weight.float() + offset)
    return normed.to(x.dtype)


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0) -> Tensor:
    return torch.empty_like(x)


RMS_NORM = torch.ops.reroll.rms_norm.default
