"""What the loop carries for rows on their way, held together as long as the rows stay together."""

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
    """One token on its way: its slot and place there, and its next trip.

    What the loop has for it stands at `index` of a frame. `left`: it left before the last trip. A
    row in the `background` has given its token out already, and only makes the caches exact.
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
        """What the loop carries for it: [1, ...] each."""
        return [value[self.index : self.index + 1] for value in self.frame.carry]


@dataclass(eq=False)
class Frame:
    """Carried values and inputs of the loop for several rows; `places` are their slots and places.

    A tensor among the inputs has one row for each of them, or is the same for all; an input that is
    a tuple has one value for each trip.
    """

    carry: list[Tensor]
    inputs: list[Any]
    places: list[Place]
    rows: list[Row] = field(default_factory=list)

    @staticmethod
    def of(carry: list[Tensor], inputs: list[Any], places: list[Place]) -> list[Row]:
        """The rows of a new frame."""
        frame = Frame(carry, inputs, places)
        frame.rows = [Row(*place, frame, number) for number, place in enumerate(places)]
        return frame.rows

    def has(self, rows: Sequence[Row]) -> bool:
        """Whether it is of these rows, in this order."""
        return len(rows) == len(self.rows) and all(
            mine is row and row.frame is self for mine, row in zip(self.rows, rows, strict=True)
        )

    def select(self, numbers: Tensor, rows: Sequence[Row]) -> Frame:
        """The frame of some of its rows by their numbers; a row may come more than once."""
        count = len(self.places)

        def of(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(of, value))
            own = isinstance(value, Tensor) and value.shape[:1] == (count,)
            return value[numbers] if own else value

        places = [(row.slot, row.position) for row in rows]
        return Frame([value[numbers] for value in self.carry], list(map(of, self.inputs)), places)


def frame_of(rows: Sequence[Row]) -> Frame:
    """A new frame of rows that may come from several; the rows move to it."""
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
    """What rows in several trips, so many in each, have for an input of the loop."""
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
