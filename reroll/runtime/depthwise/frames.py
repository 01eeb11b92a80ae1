"""Carried values of rows in the loop, kept in one batch as long as the same rows run together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from reroll.runtime.depthwise.plan import PerSegment

Place = tuple[int, int]


@dataclass(eq=False)
class Row:
    """One token in the loop: its slot, its position in the request, and its next trip.

    Its carried values are at `index` of a frame. `left` says that it has left before the last trip.
    A row in the `background` has already given its output, and runs only to make the caches exact.
    """

    slot: int
    position: int
    frame: Frame
    index: int
    trip: int = 0
    left: bool = False
    background: bool = False

    @property
    def carry(self) -> list[Tensor]:
        """Carried values of this row: [1, ...] each."""
        return [value[self.index : self.index + 1] for value in self.frame.carry]


@dataclass(eq=False)
class Frame:
    """Carried values and loop inputs of several rows; `places` are their slots and positions.

    A tensor among the inputs either has one row for each of them, or is the same for all. An input
    that is a tuple has one value for each trip.
    """

    carry: list[Tensor]
    inputs: list[Any]
    places: list[Place]
    rows: list[Row] = field(default_factory=list)

    @staticmethod
    def of(carry: list[Tensor], inputs: list[Any], places: list[Place]) -> list[Row]:
        """Make the rows of a new frame."""
        frame = Frame(carry, inputs, places)
        frame.rows = [Row(*place, frame, number) for number, place in enumerate(places)]
        return frame.rows

    def has(self, rows: Sequence[Row]) -> bool:
        """Whether the frame consists of these rows, in this order."""
        return len(rows) == len(self.rows) and all(
            mine is row and row.frame is self for mine, row in zip(self.rows, rows, strict=True)
        )

    def select(self, numbers: Tensor, rows: Sequence[Row]) -> Frame:
        """Copy some rows to a new frame, by their numbers; a row may be selected more than once."""
        count = len(self.places)

        def of(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(of, value))
            own = isinstance(value, Tensor) and value.shape[:1] == (count,)
            return value[numbers] if own else value

        places = [(row.slot, row.position) for row in rows]
        return Frame([value[numbers] for value in self.carry], list(map(of, self.inputs)), places)


def frame_of(rows: Sequence[Row]) -> Frame:
    """Make a new frame of rows that may come from several frames, and move the rows to it."""
    sources = list(dict.fromkeys(row.frame for row in rows))
    parts = []
    order: list[Row] = []
    for source in sources:
        own = [row for row in rows if row.frame is source]
        parts.append(source.select(torch.tensor([row.index for row in own]), own))
        order += own
    joined = parts[0] if len(parts) == 1 else _joined(parts)
    if any(a is not b for a, b in zip(order, rows, strict=True)):
        place = {id(row): number for number, row in enumerate(order)}
        joined = joined.select(torch.tensor([place[id(row)] for row in rows]), rows)
    joined.rows = list(rows)
    for number, row in enumerate(rows):
        row.frame, row.index = joined, number
    return joined


def _joined(parts: Sequence[Frame]) -> Frame:
    def of(values: Sequence[Any]) -> Any:
        first = values[0]
        if isinstance(first, tuple):
            return tuple(map(of, zip(*values, strict=True)))
        counts = zip(values, parts, strict=True)
        own = all(isinstance(v, Tensor) and v.shape[:1] == (len(p.places),) for v, p in counts)
        return torch.cat(list(values)) if own else first

    return Frame(
        [torch.cat(each) for each in zip(*(p.carry for p in parts), strict=True)],
        [of(each) for each in zip(*(p.inputs for p in parts), strict=True)],
        [place for part in parts for place in part.places],
    )


def input_at(value: Any, trips: Sequence[int], sizes: Sequence[int]) -> Any:
    """Return the value of a loop input for rows of several trips, `sizes` rows in each."""
    if not isinstance(value, tuple):
        return value
    own = [value[trip] for trip in trips]
    if all(x is own[0] for x in own):
        return own[0]
    if isinstance(own[0], Tensor) and own[0].shape[:1] == (sum(sizes),):
        parts = zip(own, torch.tensor([0, *sizes]).cumsum(0).tolist(), sizes, strict=False)
        return torch.cat([x[start : start + size] for x, start, size in parts])
    same = not isinstance(own[0], Tensor) and len(set(own)) == 1
    return own[0] if same else PerSegment(tuple(own))
