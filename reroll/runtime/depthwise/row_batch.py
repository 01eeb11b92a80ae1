"""Carried values of rows in the loop, kept in one batch as long as the same rows run together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from reroll.runtime.depthwise.plan import PerSegment

SlotPosition = tuple[int, int]


@dataclass(eq=False)
class Row:
    """One token in the loop: its slot, its position in the request, and its next trip.

    Its carried values are at `index` of a batch. `left` says that it has left before the last trip.
    A row in the `background` has already given its output, and runs only to make the caches exact.
    """

    slot: int
    position: int
    batch: RowBatch
    index: int
    trip: int = 0
    left: bool = False
    background: bool = False

    @property
    def carry(self) -> list[Tensor]:
        """Carried values of this row: [1, ...] each."""
        return [value[self.index : self.index + 1] for value in self.batch.carry]


@dataclass(eq=False)
class RowBatch:
    """Carried values and loop inputs of several rows; `positions` are their slots and positions.

    A tensor among the inputs either has one row for each of them, or is the same for all. An input
    that is a tuple has one value for each trip.
    """

    carry: list[Tensor]
    inputs: list[Any]
    positions: list[SlotPosition]
    rows: list[Row] = field(default_factory=list)

    def has(self, rows: Sequence[Row]) -> bool:
        """Whether the batch consists of these rows, in this order."""
        return len(rows) == len(self.rows) and all(
            mine is row and row.batch is self for mine, row in zip(self.rows, rows, strict=True)
        )

    def select(self, numbers: Tensor, rows: Sequence[Row]) -> RowBatch:
        """Copy some rows to a new batch, by their numbers; a row may be selected more than once."""
        count = len(self.positions)

        def of(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(of, value))
            per_row = isinstance(value, Tensor) and value.shape[:1] == (count,)
            return value[numbers] if per_row else value

        positions = [(row.slot, row.position) for row in rows]
        return RowBatch(
            [value[numbers] for value in self.carry], list(map(of, self.inputs)), positions
        )


def gather_rows(rows: Sequence[Row]) -> RowBatch:
    """Make a new batch of rows that may come from several batches, and move the rows to it."""
    sources = list(dict.fromkeys(row.batch for row in rows))
    parts = []
    order: list[Row] = []
    for source in sources:
        selected = [row for row in rows if row.batch is source]
        parts.append(source.select(torch.tensor([row.index for row in selected]), selected))
        order += selected
    joined = parts[0] if len(parts) == 1 else _joined(parts)
    if any(a is not b for a, b in zip(order, rows, strict=True)):
        index = {id(row): number for number, row in enumerate(order)}
        joined = joined.select(torch.tensor([index[id(row)] for row in rows]), rows)
    joined.rows = list(rows)
    for number, row in enumerate(rows):
        row.batch, row.index = joined, number
    return joined


def _joined(parts: Sequence[RowBatch]) -> RowBatch:
    def of(values: Sequence[Any]) -> Any:
        first = values[0]
        if isinstance(first, tuple):
            return tuple(map(of, zip(*values, strict=True)))
        counts = zip(values, parts, strict=True)
        per_row = all(
            isinstance(v, Tensor) and v.shape[:1] == (len(p.positions),) for v, p in counts
        )
        return torch.cat(list(values)) if per_row else first

    return RowBatch(
        [torch.cat(each) for each in zip(*(p.carry for p in parts), strict=True)],
        [of(each) for each in zip(*(p.inputs for p in parts), strict=True)],
        [position for part in parts for position in part.positions],
    )


def input_at(value: Any, trips: Sequence[int], sizes: Sequence[int]) -> Any:
    """Return the value of a loop input for rows of several trips, `sizes` rows in each."""
    if not isinstance(value, tuple):
        return value
    values = [value[trip] for trip in trips]
    if all(x is values[0] for x in values):
        return values[0]
    if isinstance(values[0], Tensor) and values[0].shape[:1] == (sum(sizes),):
        parts = zip(values, torch.tensor([0, *sizes]).cumsum(0).tolist(), sizes, strict=False)
        return torch.cat([x[start : start + size] for x, start, size in parts])
    same = not isinstance(values[0], Tensor) and len(set(values)) == 1
    return values[0] if same else PerSegment(tuple(values))
