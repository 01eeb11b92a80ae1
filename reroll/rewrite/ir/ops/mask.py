"""Which keys a query sees, as an additive mask."""

from __future__ import annotations

import torch
from torch import Tensor


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
    """The additive attention mask: 0 where a query may see a key, else the lowest finite value.

    Position `i` of the queries stands at `q_offset + i` of the keys. `causal`: no key after the
    query. `window`: with `causal` the last `window` keys including the query's own, without it the
    keys at a distance of at most `window`. `chunk`: only keys of the query's own chunk, counted
    from the first token that is not padding. `blocks` [batch, kv_length]: tokens with the same
    number of 0 or more see each other in both directions, whatever the rest says. `prefix`: the
    first so many tokens that are not padding stay in sight of all that causality lets see them,
    whatever window and chunk say (attention sinks, arXiv 2309.17453). `padding` [batch, kv_length]
    is 0 at keys that nobody sees.

    Returns [batch, 1, q_length, kv_length] of `dtype`.
    """
    q = torch.arange(q_length)[:, None] + q_offset
    kv = torch.arange(kv_length)[None, :]
    if padding is not None:
        q, kv = q.to(padding.device), kv.to(padding.device)
    keep = visible(q, kv, causal, window)[None, None].expand(batch, 1, -1, -1)
    if chunk is not None:
        first = torch.zeros(batch, dtype=torch.long, device=q.device)
        if padding is not None:
            first = (padding.bool().cumsum(-1) == 0).sum(-1)
        first = first[:, None, None, None]
        keep = keep & ((kv - first) // chunk == (q - first) // chunk)
    if prefix is not None:
        keep = keep | (in_prefix(padding, kv[0], prefix) & visible(q, kv, causal, None))
    if blocks is not None:
        of_query = blocks[:, q_offset : q_offset + q_length, None]
        same = (of_query == blocks[:, None, :kv_length]) & (of_query >= 0)
        keep = keep | same[:, None]
    if padding is not None:
        keep = keep & padding[:, None, None, :kv_length].bool()
    return torch.where(keep, torch.zeros((), dtype=dtype), torch.finfo(dtype).min).contiguous()


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


def visible(q: Tensor, kv: Tensor, causal: bool, window: int | None) -> Tensor:
    """Which keys at positions `kv` a query at position `q` may see (the two broadcast)."""
    if causal:
        seen = kv <= q
        return seen if window is None else seen & (kv > q - window)
    if window is None:
        return (kv >= 0) & (q >= 0)
    return ((q - kv).abs() <= window) & (window > 0)


def in_prefix(padding: Tensor | None, kv: Tensor, prefix: int) -> Tensor:
    """Which of the keys at positions `kv` [keys] are among the first `prefix` that are not padding.

    Returns [batch or 1, 1, 1, keys]; `padding` is over all tokens from the first on.
    """
    if padding is None:
        return (kv < prefix)[None, None, None]
    number = padding.long().cumsum(-1)[:, kv.clamp(max=padding.shape[1] - 1)]
    return (number <= prefix)[:, None, None]


MASK = torch.ops.reroll.mask.default
