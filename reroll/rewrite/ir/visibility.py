"""Which keys a query of an attention sees, as one value.

A query at position q sees a key at position k, both counted from the first token of the row, if

    causal     k <= q
    window w   q - k < w; without causality |q - k| <= w
    chunk c    floor((k - f) / c) = floor((q - f) / c), with f the first token that is no padding
    prefix p   or k is one of the first p tokens that are no padding, whatever window and chunk say
               (attention sinks, arXiv 2309.17453); causality holds for these, too
    blocks     or both have the same number of 0 or more, whatever the others say
    padding    and k is no padding

`Visibility` holds these arguments as the ops `attention`, `attention_mass` and `mask` have them.
This file answers in tensors; a target that has no tensors builds the same from the same value, as
`reroll.export.onnx.ops.masks` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, fx

from reroll.rewrite.ir.matching import bind


@dataclass(frozen=True)
class Visibility:
    """The arguments of an attention that say which keys a query sees.

    A field is a value while a Program runs. It can be a node while the Program is rewritten, and
    what stands for a value while a target is written.

    Attributes:
        causal: whether a query sees no key behind itself.
        window: how many tokens back it sees, itself among them; None for all.
        chunk: size of the chunks that see only themselves.
        padding: [batch, tokens], 0 at keys that nobody sees.
        blocks: [batch, tokens], the number of each token's block; -1 for none.
        prefix: how many of the first tokens stay in sight.
    """

    causal: Any = False
    window: Any = None
    chunk: Any = None
    padding: Any = None
    blocks: Any = None
    prefix: Any = None

    @classmethod
    def of(cls, node: fx.Node) -> Visibility:
        """The visibility that a node of `attention`, `attention_mass` or `mask` has."""
        return cls.among(bind(node.target, node.args, node.kwargs))

    @classmethod
    def among(cls, arguments: Mapping[str, Any]) -> Visibility:
        """The visibility among an op's arguments by name."""
        return cls(**{name: arguments[name] for name in NAMES if name in arguments})

    def map(self, function: Callable[[Any], Any]) -> Visibility:
        """The same with every field passed through a function."""
        return Visibility(*map(function, self.values()))

    def values(self) -> tuple[Any, ...]:
        """The fields in the order of the class."""
        return tuple(getattr(self, name) for name in NAMES)

    # ---- questions that need no positions

    @property
    def is_empty(self) -> bool:
        """Whether no query sees anything."""
        return self.window == 0 and not self.prefix

    @property
    def is_by_key(self) -> bool:
        """Whether all queries see the same keys: at most padding hides any."""
        limits = (self.window, self.chunk, self.blocks)
        return self.causal is False and all(limit is None for limit in limits)

    @property
    def is_limited(self) -> bool:
        """Whether anything but causality hides keys, or blocks show more."""
        return any(v is not None for v in (self.padding, self.blocks, self.window, self.chunk))

    def most_keys(self, keys: int) -> int:
        """How many of `keys` keys one query sees at most. Fields that are nodes are not counted."""
        first = self.prefix if isinstance(self.prefix, int) else 0
        if isinstance(self.window, int):
            # without causality, a window reaches to both sides
            both = self.causal is False
            keys = min(keys, first + (2 * self.window + 1 if both else self.window))
        if isinstance(self.chunk, int):
            keys = min(keys, first + self.chunk)
        return keys

    # ---- answers in tensors

    def near(self, q: Tensor, kv: Tensor, number: Tensor) -> Tensor:
        """Whether causality, window, chunk and prefix let a query see a key.

        `q` and `kv` are positions, `number` how many tokens of its row stand before a key. All
        broadcast.
        """
        before = kv <= q if self.causal else None
        seen = before
        if self.window is not None:
            distance = q - kv
            near = distance < self.window if self.causal else distance.abs() <= self.window
            seen = near & (self.window > 0) if seen is None else seen & near
        if self.chunk is not None:
            same = kv // self.chunk == q // self.chunk
            seen = same if seen is None else seen & same
        if seen is None:
            return (kv >= 0) & (q >= 0)
        if self.prefix is not None:
            first = number < self.prefix
            seen = seen | (first if before is None else first & before)
        return seen

    def seen(self, q: Tensor, keys: int, start: int = 0) -> Tensor:
        """Which of `keys` keys from position `start` on the queries at positions `q` see.

        Returns booleans [batch or 1, 1, queries, keys]. Keys beyond `padding` are hidden, those
        beyond `blocks` are in no block.
        """
        kv = torch.arange(keys, device=q.device) + start
        rows = q[:, None]
        columns, number = kv, kv
        if self.padding is not None and (self.chunk is not None or self.prefix is not None):
            counted = self.padding.bool().cumsum(-1)
            if self.chunk is not None:
                first = (counted == 0).sum(-1)[:, None, None, None]
                rows, columns = rows - first, columns - first
            number = counted[:, kv.clamp(max=counted.shape[1] - 1)][:, None, None] - 1
        seen = self.near(rows, columns, number)
        seen = seen[(None,) * (4 - seen.dim())]
        if self.blocks is not None:
            seen = seen | self.same_block(q, kv)
        if self.padding is not None:
            seen = seen & _columns(self.padding, start, keys)[:, None, None]
        return seen

    def same_block(self, q: Tensor, kv: Tensor) -> Tensor:
        """Whether tokens at positions `q` and `kv` are in one block: [batch, 1, queries, keys]."""
        last = self.blocks.shape[1] - 1
        of_q = self.blocks[:, q.clamp(max=last)].masked_fill(q > last, -1)
        of_kv = self.blocks[:, kv.clamp(max=last)].masked_fill(kv > last, -1)
        same: Tensor = (of_q[:, :, None] == of_kv[:, None]) & (of_q[:, :, None] >= 0)
        return same[:, None]

    def added(self, q: Tensor, keys: int, dtype: torch.dtype) -> Tensor:
        """`seen` as what is added to scores: 0 where a key is seen, else the lowest value."""
        lowest = torch.finfo(dtype).min
        return torch.where(self.seen(q, keys), torch.zeros((), dtype=dtype), lowest)


NAMES = tuple(f.name for f in fields(Visibility))


def _columns(padding: Tensor, start: int, keys: int) -> Tensor:
    """Padding as booleans [batch, keys] for the keys from `start` on; False beyond its end."""
    padding = padding[:, start : start + keys].bool()
    missing = keys - padding.shape[1]
    return torch.nn.functional.pad(padding, (0, missing)) if missing > 0 else padding
