"""Hidden states of tokens that have exited a loop."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("reroll::hold", mutates_args=())
def hold(done: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """Select `old` [batch, time, width] where a token is done [batch, time], else `new`."""
    return torch.where(done[..., None], old, new)


@hold.register_fake
def _(done: Tensor, old: Tensor, new: Tensor) -> Tensor:
    return torch.empty_like(new)


HOLD = torch.ops.reroll.hold.default
