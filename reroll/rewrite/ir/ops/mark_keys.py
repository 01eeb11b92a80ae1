"""Keys of tokens that skip a layer."""

from __future__ import annotations

import torch
from torch import Tensor

# added to the scores of an absent key, before the scale: enough that its attention weight is 0,
# and finite in fp16
ABSENT = -3e4


@torch.library.custom_op("reroll::mark_keys", mutates_args=())
def mark_keys(k: Tensor, absent: Tensor) -> Tensor:
    """Append a channel to keys that hides those of `absent` [batch, time] tokens.

    The last channel of the result [batch, kv_heads, time, head_dim + 1] is `ABSENT` for these
    tokens and 0 elsewhere. Queries have a 1 in theirs. A cache of keys so records which tokens are
    absent.
    """
    mark = absent.to(k.dtype)[:, None, :, None] * ABSENT
    return torch.cat((k, mark.expand(-1, k.shape[1], -1, -1)), -1)


@mark_keys.register_fake
def _(k: Tensor, absent: Tensor) -> Tensor:
    return k.new_empty(*k.shape[:-1], k.shape[-1] + 1)


MARK_KEYS = torch.ops.reroll.mark_keys.default
