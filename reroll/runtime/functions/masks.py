"""Attention masks of the lowered module: made once per forward, and only where one is needed.

A mask covers the keys that a cache layer will return, which are not always all tokens so far. A
sliding layer has dropped the oldest keys, and a static layer has unfilled slots. The layer says at
which token its keys start.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reroll.mixers import Tree
from reroll.rewrite.ir.visibility import Visibility
from reroll.runtime.functions.bands import Band
from reroll.runtime.functions.documents import Documents


def visible_tokens(mask: Tensor | None) -> Tensor | None:
    """Convert a padding mask to booleans, or to None if it hides nothing.

    A 4-d mask is returned as it is.
    """
    if mask is None:
        return None
    if mask.dim() == 4:
        return mask
    mask = mask.bool()
    return None if _has_values(mask) and bool(mask.all()) else mask


def _has_values(tensor: Tensor) -> bool:
    """Whether a tensor's values can be read: not while compiling, and not on the meta device."""
    return not torch.compiler.is_compiling() and tensor.device.type != "meta"


def make_mask(
    layer: Any, like: Tensor | None, length: int | None, keys: int | None, *limits: Any
) -> Tensor | Band | None:
    """Make the mask of an attention of `length` queries, before its cache `layer` is updated.

    `limits` are the fields of a `Visibility`. Its padding can also be the documents of packed rows,
    or a 4-d mask that is returned as is. Without a cache, `layer` is None and `keys` is the number
    of keys. `like` is a tensor on the wanted device.

    Returns None if every query sees all that causality allows, otherwise booleans [batch or 1, 1,
    queries or 1, keys]. These have no columns if nothing is visible. A window over a much longer
    sequence gives a `Band`.
    """
    visibility = Visibility(*limits)
    if isinstance(visibility.padding, Documents):
        if visibility.causal and not visibility.is_empty:
            return visibility.padding.visible(visibility)
        # in transformers, attention that is not causal sees all documents
        visibility = replace(visibility, padding=None)
    padding = visibility.padding
    if padding is not None and padding.dim() == 4:
        return padding  # type: ignore[no-any-return]
    if padding is not None and getattr(layer, "compact", False):
        # each row's past tokens stand together in such a layer
        count = layer.get_seq_length()
        past, new = padding[:, :count], padding[:, count:]
        padding = torch.cat([past.sort(-1).values, new], 1)
        visibility = replace(visibility, padding=padding)
    if visibility.is_by_key:
        return None if padding is None else padding[:, None, None]
    assert length is not None
    assert like is not None
    if visibility.is_empty:
        return torch.empty(1, 1, length, 0, dtype=torch.bool, device=like.device)
    keys = length if keys is None else keys
    start, offset, kept = 0, keys - length, 0
    if layer is not None:
        keys, start = layer.get_mask_sizes(length)
        offset = layer.get_seq_length()
        # the first columns, of tokens that the layer keeps for good
        kept = getattr(layer, "kept", 0)
        keys -= kept
        tree = getattr(layer, "tree", None)
        if tree is not None:
            return _tree_mask(visibility, tree, keys - length, start, offset, kept)
    others = visibility.has_other("causal", "window", "chunk", "prefix")
    if padding is None and not others and not isinstance(start, Tensor):
        if start >= kept and _sees_all(layer, length, keys, offset, visibility):
            return None
        band = _band(length, keys, offset, visibility)
        if band is not None:
            return band
    q = torch.arange(length, device=like.device) + offset
    visible = visibility.visible(q, keys, start)
    return _with_kept(visible, padding, start, kept) if kept else visible


def _tree_mask(
    visibility: Visibility, tree: Tree, held: int, start: int, past: int, kept: int
) -> Tensor:
    """Make the mask of a tree of tokens behind `held` keys: each sees the past and its ancestors.

    A token has the position of one in a sequence that is as deep, and tokens are no padding.
    """
    padding = visibility.padding
    if padding is not None:
        whole = F.pad(padding[:, :past].bool(), (0, tree.height), value=True)
        visibility = replace(visibility, padding=whole)
    sequence = visibility.visible(past + tree.depth, held + tree.height, start)
    columns = torch.cat((torch.arange(held, device=tree.depth.device), held + tree.depth))
    visible = sequence[..., columns]
    visible[..., held:] &= tree.ancestors
    return _with_kept(visible, padding, start, kept) if kept else visible


def _band(length: int, keys: int, offset: Any, visibility: Visibility) -> Band | None:
    """Return the `Band` of a window over a sequence without a past, if that is faster."""
    window = visibility.window
    if window is None or not visibility.causal or visibility.chunk is not None:
        return None
    if isinstance(offset, Tensor) or torch.compiler.is_compiling():
        return None
    band = Band(length, window, visibility.prefix or 0)
    return band if offset == 0 and keys == length and band.pays else None


def _with_kept(visible: Tensor, padding: Tensor | None, start: int | Tensor, kept: int) -> Tensor:
    """Add columns for kept first tokens, False where a token also has a column among the others."""
    number = torch.arange(kept, device=visible.device)
    if padding is None:
        past = (number < start)[None]
    else:
        at = torch.arange(padding.shape[1], device=padding.device)
        past = number < (padding.bool() & (at < start)).sum(-1, keepdim=True)
    batch = max(visible.shape[0], past.shape[0])
    first = past[:, None, None].expand(batch, 1, visible.shape[2], -1)
    return torch.cat((first, visible.expand(batch, -1, -1, -1)), dim=-1)


def _sees_all(layer: Any, length: int, keys: int, offset: Any, visibility: Visibility) -> bool:
    """Whether the mask is causality alone, with queries and keys that start at the same token."""
    window, chunk = visibility.window, visibility.chunk
    if not visibility.causal:
        near = window is None or keys <= window + 1
        return near and (chunk is None or keys <= chunk)
    if isinstance(offset, Tensor):
        # static cache: a decoding step always has unfilled slots, a first prefill only at the end
        if length == 1 or not _has_values(offset):
            return False
        offset = int(offset)
    if chunk is not None and offset + length > chunk:
        return False
    if length > 1:
        return offset == 0 and (window is None or length <= window)
    static = layer is not None and layer.is_compileable
    return not static and (window is None or keys <= window)


def kept_bias(layer: Any, bias: Tensor, padding: Tensor | None, k: Tensor) -> Tensor:
    """Fit a bias over all tokens to the keys `k` that a layer's update has just returned.

    `bias` is [..., tokens]. It changes only where the layer keeps first tokens.
    """
    kept = getattr(layer, "shown", 0)
    if not kept or bias.shape[-1] == 1:
        return bias
    begin = getattr(layer, "begin", None)
    if begin is None:
        last = bias[..., bias.shape[-1] - (k.shape[2] - kept) :]
    else:
        at = torch.arange(k.shape[2] - kept, device=bias.device) + begin
        last = bias[..., at.clamp(0, bias.shape[-1] - 1)]
    if padding is None or padding.dim() != 2:
        return torch.cat((bias[..., :kept], last), -1)
    number = padding.long().cumsum(-1)[:, None]
    wanted = torch.arange(1, kept + 1, device=bias.device)[:, None]
    # in rows with fewer first tokens, the mask hides the wrong columns that argmax gives
    index = ((number == wanted) & padding.bool()[:, None]).long().argmax(-1)
    index = index[:, None, None].expand(-1, *bias.shape[1:-1], -1)
    first = bias.expand(padding.shape[0], *bias.shape[1:]).gather(-1, index)
    return torch.cat((first, last.expand(padding.shape[0], *last.shape[1:])), -1)
