"""Hidden states of tokens that have left a loop."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("reroll::hold", mutates_args=())
def hold(done: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """`old` [batch, time, width] where a token is done [batch, time], and `new` where it is not."""
    return torch.where(done[..., None], old, new)


@hold.register_fake
def _(done: Tensor, old: Tensor, new: Tensor) -> Tensor:
    return torch.empty_like(new)


HOLD = torch.ops.reroll.hold.default
