"""Conversion to fp32 that a model asks for itself."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("reroll::widen", mutates_args=())
def widen(x: Tensor) -> Tensor:
    """Convert `x` to fp32, whatever the dtype of the program.

    The op marks a conversion to fp32 in the model's own code. In a program in fp32, all other
    conversions to fp32 are conversions to the dtype of the program.
    """
    return x.to(torch.float32, copy=True)


@widen.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.float32)


WIDEN = torch.ops.reroll.widen.default
