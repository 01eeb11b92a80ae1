"""A conversion to fp32 that a model asks for itself."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("reroll::widen", mutates_args=())
def widen(x: Tensor) -> Tensor:
    """`x` in fp32, whatever the dtype of the program.

    Stands where a model asks for fp32 itself. In a program in fp32 it says which conversions to
    fp32 are of this kind; the others are to the dtype of the program.
    """
    return x.to(torch.float32, copy=True)


@widen.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.float32)


WIDEN = torch.ops.reroll.widen.default
