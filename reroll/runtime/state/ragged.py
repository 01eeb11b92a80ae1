"""Rows of a batch that go back by different numbers of tokens.

A layer that holds all tokens keeps the entries that some row still sees, and a mask hides them from
the others. A layer of constant size goes back row by row: a window's columns are moved to the
right, so that each row's last tokens stand together, as behind padding on the left. Such a layer is
marked `compact`, and its masks are made of padding that is moved to the left (`make_mask`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer

from reroll.runtime.state.growing import GrowingLayer, take_back
from reroll.runtime.state.states import Again, Rewinding, join_rows, rows_of


def take_back_rows(cache: Any, counts: Sequence[int]) -> None:
    """Remove the last `counts` tokens of each row of a cache whose tensors nobody else holds."""
    if len(set(counts)) == 1:
        take_back(cache, counts[0])
        return
    for layer in cache.layers:
        if isinstance(layer, Rewinding):
            _rewind(layer, counts)
        elif isinstance(layer, DynamicSlidingWindowLayer):
            _slide(layer, counts)
        elif isinstance(layer, GrowingLayer):
            layer.take_back(min(counts))
        else:
            layer.crop(-min(counts))


def go_back_from_padding(
    layer: Any, padding: Tensor | None, before: tuple[Any, ...], length: int, again: Again
) -> None:
    """Let each row's state be that behind the last of its new tokens that is not padding.

    So padding behind a prompt takes no place of a window, and none in a queue of delayed tokens.
    `before` is the state before the `length` new tokens, which `again` adds once more; `padding`
    [batch, tokens] is False at padding.
    """
    if padding is None or length == 1 or layer.is_compileable or layer.goes_back:
        return
    places = layer.cumulative_length
    seen = padding[:, places - length : places].flip(1).long().cumsum(1)
    # of a row without a token, one is kept, hidden by the mask, for the shapes of its state
    most = length - 1 if places == length else length
    counts = (seen == 0).sum(1).clamp(max=most).tolist()
    if not any(counts):
        return
    past, layer._past, layer.goes_back = layer._past, [(before, length, again)], True
    _rewind(layer, counts)
    layer.cumulative_length, layer._past, layer.goes_back = places, past, False


def _rewind(layer: Any, counts: Sequence[int]) -> None:
    present, past, parts = layer.snapshot(), layer._past, []
    # the fewest tokens last, so that the layer has the most of them when the rows are joined
    for count in sorted(set(counts), reverse=True):
        layer.restore(present)
        layer._past = list(past)
        layer.crop(-count)
        rows = torch.tensor([row for row, each in enumerate(counts) if each == count])
        parts.append((rows, rows_of(layer, rows, len(counts))))
    if isinstance(layer, DynamicSlidingWindowLayer):
        width = layer.keys.shape[2]
        for _, part in parts:
            part.keys, part.values = (
                F.pad(x, (0, 0, width - x.shape[2], 0)) for x in (part.keys, part.values)
            )
    join_rows(layer, parts[::-1], len(counts))
    layer.compact = True


def _slide(layer: Any, counts: Sequence[int]) -> None:
    """Take tokens back from a layer of transformers, which holds those that were recorded."""
    least, total, kept = min(counts), layer.keys.shape[2], layer.sliding_window - 1
    width = min(total - least, kept)
    for name in ("keys", "values"):
        tensor = getattr(layer, name)
        rows = []
        for row, count in enumerate(counts):
            part = tensor[row : row + 1, :, max(total - count - width, 0) : total - count]
            rows.append(F.pad(part, (0, 0, width - part.shape[2], 0)))
        setattr(layer, name, torch.cat(rows))
    layer.cumulative_length -= least
    layer.compact = True
