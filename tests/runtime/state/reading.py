"""Caches of one layer, and random tokens to read into them, in fp64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from reroll.rewrite.analysis.state_plan import CacheLayer
from reroll.runtime.functions.attention import attend
from reroll.runtime.functions.convolutions import convolve
from reroll.runtime.functions.masks import make_mask, visible_tokens
from reroll.runtime.functions.recurrences import recur
from reroll.runtime.models.config import RerollConfig
from reroll.runtime.state.caches import cache_config, layers_of

TIME, LONGEST = 40, 48
KINDS = [
    CacheLayer("full_attention"),
    CacheLayer("sliding_attention", 4),
    CacheLayer("sliding_attention", 9),
    CacheLayer("chunked_attention", 4),
    CacheLayer("sliding_attention", 4, prefix=2),
    CacheLayer("sliding_attention", 1, prefix=1),
    CacheLayer("sliding_attention", 3, prefix=12),
    CacheLayer("hybrid_sliding"),
    CacheLayer("hybrid_sliding", recent=3),
]
generator = torch.Generator().manual_seed(0)
Q = torch.randn(2, 4, TIME, 8, dtype=torch.float64, generator=generator)
K, V = torch.randn(2, 2, 2, TIME, 8, dtype=torch.float64, generator=generator)
BETA = torch.rand(2, 2, TIME, dtype=torch.float64, generator=generator)
DECAY = -torch.rand(2, 2, TIME, dtype=torch.float64, generator=generator)
WEIGHT = torch.randn(16, 4, dtype=torch.float64, generator=generator)


class Reader:
    """A cache of one layer, and what reads tokens into it."""

    def __init__(self, planned: CacheLayer, padding: Tensor | None, static: bool = False) -> None:
        self.planned, self.padding = planned, padding
        config = RerollConfig(**cache_config([planned]))
        self.cache: Any = StaticCache(config, LONGEST) if static else DynamicCache(config=config)
        self.layers: Any = layers_of(self.cache, [planned])

    @property
    def length(self) -> int:
        return int(self.layers[0].get_seq_length())

    def read(self, count: int, order: Tensor | None = None) -> Tensor:
        past = self.length
        at = torch.arange(past, past + count) if order is None else order
        q, k, v, beta, decay = (x[:, :, at] for x in (Q, K, V, BETA, DECAY))
        padding = None if self.padding is None else self.padding[:, : past + count]
        planned = self.planned
        if planned.recent is not None:
            return convolve(self.layers, 0, k.transpose(1, 2).reshape(2, count, 16).mT, WEIGHT)
        if planned.layer_type == "hybrid_sliding":
            options = '{"chunk_size": 4}'
            gates = [decay, beta]
            return recur(self.layers, 0, q, k, v, gates, "gated_deltanet", options, padding, 2, 1)
        window = planned.size if planned.layer_type == "sliding_attention" else None
        chunk = planned.size if planned.layer_type == "chunked_attention" else None
        prefix, seen = planned.prefix or None, visible_tokens(padding)
        mask = make_mask(self.layers[0], q, count, None, True, window, chunk, seen, None, prefix)
        told = {"padding": seen} if prefix else {}
        keys, values = self.layers[0].update(k, v, **told)
        return attend(q, keys, values, 0.3, True, mask)


def named(planned: CacheLayer) -> str:
    return "-".join(str(x) for x in (*planned.reach, planned.recent) if x)
