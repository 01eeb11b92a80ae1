"""Packed rows: several documents in one row, told apart by position ids that start again.

As in transformers, a forward without a padding mask and without a cache keeps documents apart: a
new document starts wherever the position does not increase by one. Attention then sees its own
document only. Windows, chunks, first tokens and recurrences count from the start of the document.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reroll.errors import UsageError
from reroll.rewrite.analysis.mixing import mask_beside
from reroll.rewrite.ir.records import Input
from reroll.rewrite.ir.visibility import Visibility


@dataclass(frozen=True)
class Documents:
    """Documents of packed rows, given by the `positions` [batch, time] of their tokens."""

    positions: Tensor

    @property
    def number(self) -> Tensor:
        """Number of each token's document within its row: [batch, time]."""
        return F.pad((self.positions.diff(dim=-1) != 1).long().cumsum(-1), (1, 0))

    @property
    def offset(self) -> Tensor:
        """Number of tokens of the same document before each token: [batch, time]."""
        index = torch.arange(self.positions.shape[1], device=self.positions.device)
        begins = F.pad(self.positions.diff(dim=-1) != 1, (1, 0), value=True)
        return index - torch.where(begins, index, 0).cummax(-1).values

    def to(self, *args: Any, **kwargs: Any) -> Documents:
        """Move the positions to another device, for models that are spread over several."""
        return Documents(self.positions.to(*args, **kwargs))

    def visible(self, visibility: Visibility) -> Tensor:
        """Return the mask [batch, 1, queries, keys] of causal attention without padding or past."""
        number = self.number
        near = visibility.near(
            self.positions[:, :, None], self.positions[:, None], self.offset[:, None]
        )
        visible = (near & (number[:, :, None] == number[:, None]))[:, None]
        if visibility.blocks is None:
            return visible
        index = torch.arange(visible.shape[-1], device=visible.device)
        return visible | visibility.same_block(index, index)


def documents_of(
    inputs: tuple[Input, ...], values: Mapping[str, Tensor | None], mixing: str | None
) -> Documents | None:
    """Find the documents of packed rows; return None if every row is one document.

    `values` are the inputs of a forward without a cache. `mixing` names an operation, other than
    attention and recurrences, that mixes tokens. Raises UsageError if a model that has such an
    operation gets packed rows.
    """
    item = next((i for i in inputs if i.role == "positions"), None)
    positions = None if item is None else values.get(item.name)
    if item is None or positions is None or positions.dim() != 2:
        return None
    if values.get(mask_beside(item)) is not None:
        return None
    rises = (positions.diff(dim=-1) == 1).all()
    if not torch.compiler.is_compiling() and positions.device.type != "meta":
        if rises:
            return None
        if mixing is not None:
            raise UsageError(
                f"the {item.name} begin anew within a row, and {mixing} would mix the documents",
                hint="give each document a row of its own, and an attention_mask",
            )
    elif mixing is not None:
        torch._assert_async(rises, f"documents in one row would be mixed by {mixing}")
        return None
    rows = next((t.shape[0] for i in inputs if (t := values.get(i.name)) is not None), 1)
    return Documents(positions.expand(rows, -1))
