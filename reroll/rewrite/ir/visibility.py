"""Attention masks without data: the arguments that determine which keys a query sees.

A query at position q sees a key at position k, both counted from the first token of the row, if

    causal     k <= q
    window w   q - k < w; without causality |q - k| <= w
    chunk c    floor((k - f) / c) = floor((q - f) / c), with f the first token that is no padding
    prefix p   or k is one of the first p tokens that are no padding, despite window and chunk
               (attention sinks, arXiv 2309.17453); causality holds for these, too
    blocks     or both have the same block number of 0 or more, despite all conditions above
    padding    and k is no padding

`Visibility` holds these arguments of the ops `attention`, `attention_mass` and `mask`. This file
evaluates them to tensors. An export target builds its own nodes from the same value, as
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
    """Arguments of an attention that determine which keys a query sees.

    A field is a value while a Program runs. It can be a node in a rewrite, and a target's own
    representation of a value in an export.

    Attributes:
        causal: whether a query sees no later key.
        window: number of the last tokens that a query sees, including itself; None for all.
        chunk: size of the chunks; a query sees only keys of its own chunk.
        padding: [batch, tokens], 0 at keys that no query sees.
        blocks: [batch, tokens], the number of each token's block; -1 for none.
        prefix: number of the first tokens that are always visible.
    """

    causal: Any = False
    window: Any = None
    chunk: Any = None
    padding: Any = None
    blocks: Any = None
    prefix: Any = None

    @classmethod
    def of(cls, node: fx.Node) -> Visibility:
        """Read the visibility of a node of `attention`, `attention_mass` or `mask`."""
        return cls.among(bind(node.target, node.args, node.kwargs))

    @classmethod
    def among(cls, arguments: Mapping[str, Any]) -> Visibility:
        """Select the visibility from an op's arguments by name."""
        return cls(**{name: arguments[name] for name in NAMES if name in arguments})

    def map(self, function: Callable[[Any], Any]) -> Visibility:
        """Apply a function to every field."""
        return Visibility(*map(function, self.values()))

    def values(self) -> tuple[Any, ...]:
        """Return the fields in the order of the class."""
        return tuple(getattr(self, name) for name in NAMES)

    # ---- properties that need no positions

    @property
    def is_empty(self) -> bool:
        """Whether no query sees any key."""
        return self.window == 0 and not self.prefix

    @property
    def is_by_key(self) -> bool:
        """Whether all queries see the same keys: only padding can hide keys."""
        return self.causal is False and not self.has_other("causal", "padding", "prefix")

    @property
    def is_limited(self) -> bool:
        """Whether anything but causality changes the visible keys."""
        return self.has_other("causal", "prefix")

    def has_other(self, *names: str) -> bool:
        """Whether a field that is not among `names` is set; a special case asks before it acts."""
        return any(getattr(self, name) is not None for name in NAMES if name not in names)

    def most_keys(self, keys: int) -> int:
        """Bound the number of `keys` that one query sees; fields that are nodes do not count."""
        first = self.prefix if isinstance(self.prefix, int) else 0
        if isinstance(self.window, int):
            # without causality, a window extends to both sides
            both = self.causal is False
            keys = min(keys, first + (2 * self.window + 1 if both else self.window))
        if isinstance(self.chunk, int):
            keys = min(keys, first + self.chunk)
        return keys

    # ---- evaluation to tensors

    def near(self, q: Tensor, kv: Tensor, number: Tensor) -> Tensor:
        """Compute whether causality, window, chunk and prefix let a query see a key.

        `q` and `kv` are positions; `number` is how many tokens of its row precede a key. All
        broadcast.
        """
        before = kv <= q if self.causal else None
        visible = before
        if self.window is not None:
            distance = q - kv
            near = distance < self.window if self.causal else distance.abs() <= self.window
            visible = near & (self.window > 0) if visible is None else visible & near
        if self.chunk is not None:
            same = kv // self.chunk == q // self.chunk
            visible = same if visible is None else visible & same
        if visible is None:
            return (kv >= 0) & (q >= 0)
        if self.prefix is not None:
            first = number < self.prefix
            visible = visible | (first if before is None else first & before)
        return visible

    def visible(self, q: Tensor, keys: int, start: int | Tensor = 0) -> Tensor:
        """Compute which of `keys` keys, from position `start` on, the queries at positions `q` see.

        Keys of negative positions, which a start that is a tensor may give, are hidden.
        Returns booleans [batch or 1, 1, queries, keys]. Keys after the end of `padding` are hidden;
        those after the end of `blocks` are in no block.
        """
        kv = torch.arange(keys, device=q.device) + start
        rows = q[:, None]
        columns, number = kv, kv
        if self.padding is not None and (self.chunk is not None or self.prefix is not None):
            counted = self.padding.bool().cumsum(-1)
            if self.chunk is not None:
                first = (counted == 0).sum(-1)[:, None, None, None]
                rows, columns = rows - first, columns - first
            number = counted[:, kv.clamp(0, counted.shape[1] - 1)][:, None, None] - 1
        visible = self.near(rows, columns, number)
        visible = visible[(None,) * (4 - visible.dim())]
        if self.blocks is not None:
            visible = visible | self.same_block(q, kv)
        if isinstance(start, Tensor):
            visible = visible & (kv >= 0)
        if self.padding is not None:
            visible = visible & _columns(self.padding, start, keys)[:, None, None]
        return visible

    def same_block(self, q: Tensor, kv: Tensor) -> Tensor:
        """Compute whether positions `q` and `kv` are in one block: [batch, 1, queries, keys]."""
        last = self.blocks.shape[1] - 1
        of_q = self.blocks[:, q.clamp(max=last)].masked_fill(q > last, -1)
        of_kv = self.blocks[:, kv.clamp(0, last)].masked_fill(kv > last, -1)
        same: Tensor = (of_q[:, :, None] == of_kv[:, None]) & (of_q[:, :, None] >= 0)
        return same[:, None]

    def added(self, q: Tensor, keys: int, dtype: torch.dtype) -> Tensor:
        """Compute the additive mask: 0 where a key is visible, else the dtype's minimum."""
        return additive(self.visible(q, keys), dtype)


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert booleans to an additive mask: 0 where a key is visible, else the dtype's minimum."""
    return torch.where(visible, torch.zeros((), dtype=dtype), torch.finfo(dtype).min)


NAMES = tuple(f.name for f in fields(Visibility))


def _columns(padding: Tensor, start: int | Tensor, keys: int) -> Tensor:
    """Slice padding to booleans [batch, keys] for the keys from `start` on; False after its end."""
    if isinstance(start, Tensor):
        at, last = torch.arange(keys, device=padding.device) + start, padding.shape[1] - 1
        return padding[:, at.clamp(0, last)].bool() & (at <= last)
    padding = padding[:, start : start + keys].bool()
    missing = keys - padding.shape[1]
    return torch.nn.functional.pad(padding, (0, missing)) if missing > 0 else padding
