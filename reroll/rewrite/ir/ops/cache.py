"""Cache of keys and values of all tokens so far: the state of attention."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from reroll.rewrite.ir.ops.attention import ATTENTION, keys_seen
from reroll.rewrite.ir.ops.base import Place, count, register


@torch.library.custom_op("reroll::cache", mutates_args=())
def cache(k: Tensor, v: Tensor, length: int | None = None) -> tuple[Tensor, Tensor]:
    """Append keys and values to the state of one attention; return those of all tokens so far.

    `k`, `v`: [batch, kv_heads, time, head_dim] of the new tokens. The lowered module appends them
    to the cache of the running generation. This reference has no past and returns copies of them.
    `length` is the total number of tokens, which is known only in a capture.
    """
    if length is not None and length != k.shape[-2]:
        raise ValueError("the reference of reroll::cache has no past: run the lowered module")
    return k.clone(), v.clone()


@cache.register_fake
def _(k: Tensor, v: Tensor, length: int | None = None) -> tuple[Tensor, Tensor]:
    if length is None:
        return torch.empty_like(k), torch.empty_like(v)
    return (
        k.new_empty(*k.shape[:-2], length, k.shape[-1]),
        v.new_empty(*v.shape[:-2], length, v.shape[-1]),
    )


CACHE = torch.ops.reroll.cache.default


def _cache(node: fx.Node, place: Place) -> int:
    readers = _attentions(node)
    tokens = max((keys_seen(a, place) for a in readers), default=place.context)
    total = 0
    for tensor in node.args[:2]:
        assert isinstance(tensor, fx.Node)
        type_ = tensor.meta["type"]  # [batch, kv_heads, time, head_dim]
        total += count((type_.shape[1], type_.shape[3])) * tokens * type_.dtype.itemsize
    return total


def _attentions(node: fx.Node) -> list[fx.Node]:
    """Find the attentions that read a cache, through reshapes and repeats of its tensors."""
    attentions: list[fx.Node] = []
    visited: set[fx.Node] = set()
    stack = list(node.users)
    while stack:
        user = stack.pop()
        if user in visited or user.target is torch.ops.aten.linear.default:
            continue
        visited.add(user)
        if user.target is ATTENTION:
            attentions.append(user)
        else:
            stack += user.users
    return attentions


register(CACHE, state=_cache)
