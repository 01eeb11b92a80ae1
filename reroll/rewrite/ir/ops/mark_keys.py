"""Keys of tokens that skip a layer."""

from __future__ import annotations

import torch
from torch import Tensor

# what `mark_keys` adds to the scores, before the scale, of a key that is not there: enough that its
# weight is 0, and not too much for fp16
ABSENT = -3e4


@torch.library.custom_op("reroll::mark_keys", mutates_args=())
def mark_keys(k: Tensor, absent: Tensor) -> Tensor:
    """Keys [batch, kv_heads, time, head_dim + 1] that nobody reads where `absent` [batch, time].

    The last channel is `ABSENT` there and 0 elsewhere; queries have a 1 in theirs. So a cache holds
    with its keys which of its tokens are there.
    """
    mark = absent.to(k.dtype)[:, None, :, None] * ABSENT
    return torch.cat((k, mark.expand(-1, k.shape[1], -1, -1)), -1)


@mark_keys.register_fake
def _(k: Tensor, absent: Tensor) -> Tensor:
    return k.new_empty(*k.shape[:-1], k.shape[-1] + 1)


MARK_KEYS = torch.ops.reroll.mark_keys.default
