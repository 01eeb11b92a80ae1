"""The caches of all running requests: one tensor per layer, one slot per request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reroll.errors import UsageError
from reroll.runtime.attention import attend
from reroll.runtime.caches import CacheLayer

Places = Sequence[tuple[int, int]]


class Pool:
    """Keys and values [slots, kv_heads, length, head_dim] of each layer, and how many are filled.

    `lengths[slot]` counts the tokens of a request that have been given out.
    """

    def __init__(self, plan: Sequence[CacheLayer], slots: int, length: int, like: Tensor) -> None:
        if any(layer.kv_heads is None or layer.head_dim is None for layer in plan):
            raise UsageError("the sizes of a cache layer are known only when the model runs")
        self.length = length
        self.lengths = [0] * slots
        shapes = [(slots, layer.kv_heads or 0, length, layer.head_dim or 0) for layer in plan]
        self.keys = [like.new_empty(shape) for shape in shapes]
        self.values = [like.new_empty(shape) for shape in shapes]

    def fill(self, slot: int, cache: Any, length: int) -> None:
        """Copy the caches of a prompt, that of one row, into a slot."""
        for number, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            layer = cache.layers[number]
            keys[slot, :, :length] = layer.keys[0]
            values[slot, :, :length] = layer.values[0]
        self.lengths[slot] = length

    def store(self, layers: Sequence[int], places: Places, k: Tensor, v: Tensor) -> None:
        """Put the keys and values [rows, kv_heads, 1, head_dim] of tokens into their layers.

        `places` are the slot and the position of each token.
        """
        for row, (layer, (slot, position)) in enumerate(zip(layers, places, strict=True)):
            self.keys[layer][slot, :, position] = k[row, :, 0]
            self.values[layer][slot, :, position] = v[row, :, 0]

    def attend(
        self,
        layers: Sequence[int],
        places: Places,
        q: Tensor,
        scale: float,
        windows: Sequence[int | None],
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Attention of new tokens `q` [rows, heads, 1, head_dim] over their own requests' caches.

        Returns [rows, 1, heads, head_dim].
        """
        kv_heads = self.keys[layers[0]].shape[1]
        plain = softcap is None and sinks is None
        grouped = q.unflatten(1, (kv_heads, -1)).squeeze(3) if plain else q
        out = []
        for row, (layer, (slot, position)) in enumerate(zip(layers, places, strict=True)):
            stop = position + 1
            start = 0 if windows[row] is None else max(0, stop - (windows[row] or 0))
            k = self.keys[layer][slot : slot + 1, :, start:stop]
            v = self.values[layer][slot : slot + 1, :, start:stop]
            if plain:
                out.append(
                    F.scaled_dot_product_attention(grouped[row : row + 1], k, v, scale=scale)
                )
            else:
                out.append(attend(q[row : row + 1], k, v, scale, False, None, softcap, sinks))
        joined = torch.cat(out)
        return joined.flatten(1, 2)[:, None] if plain else joined
