"""Count of consecutive trips that predict the same token."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("reroll::streak", mutates_args=())
def streak(token: Tensor, last: Tensor, count: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Return the predicted token, and how many previous trips in a row predicted it.

    All are [batch, time]. At an infinite threshold there is no exit, and `last` and `count` are
    returned.
    """
    if threshold == float("inf"):
        return last.clone(), count.clone()
    return token.clone(), torch.where(token == last, count + 1, 0)


@streak.register_fake
def _(token: Tensor, last: Tensor, count: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(last), torch.empty_like(count)


STREAK = torch.ops.reroll.streak.default
