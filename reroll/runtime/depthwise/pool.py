"""Caches of all running requests: one tensor for each cache of a trip, one slot per request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reroll.errors import UsageError
from reroll.rewrite.ir.ops import ABSENT
from reroll.runtime.functions.attention import attend

# up to this many keys (rows times length), one attention runs over a copy of all rows' keys
TOGETHER = 4096


class KeyPositions:
    """Trips, slots and positions of the keys of a batch's rows."""

    def __init__(
        self, trips: Sequence[int], positions: Sequence[tuple[int, int]], device: torch.device
    ) -> None:
        self.trips = list(trips)
        self.slots, self.positions = ([p[i] for p in positions] for i in (0, 1))
        numbers = self.trips, self.slots, self.positions
        self.index = tuple(torch.tensor(x, device=device) for x in numbers)
        self.longest = max(self.positions) + 1
        self.masks: dict[tuple[int | None, ...], Tensor | None] = {}

    def mask(self, windows: Sequence[int | None]) -> Tensor | None:
        """Return which keys each row sees [rows, 1, 1, longest], or None if each sees all."""
        key = tuple(windows)
        if key not in self.masks:
            # on the host, so that testing whether anything is masked does not wait for the device
            last, keys = torch.tensor(self.positions)[:, None], torch.arange(self.longest)
            visible = keys <= last
            if any(window is not None for window in windows):
                sizes = [self.longest if w is None else w for w in windows]
                visible = visible & (keys > last - torch.tensor(sizes)[:, None])
            whole = bool(visible.all())
            self.masks[key] = None if whole else visible[:, None, None].to(self.index[0].device)
        return self.masks[key]


class Pool:
    """Keys and values [trips, slots, kv_heads, length, size] of each cache in a trip.

    `kinds` are the types of keys and values of one trip. `lengths[slot]` counts the tokens of a
    request whose outputs are known. With `marks_absent`, positions are marked as absent until they
    are stored: see `reroll.rewrite.ir.ops.mark_keys`.
    """

    def __init__(
        self,
        kinds: Sequence[Sequence[Sequence[Any]]],
        trips: int,
        slots: int,
        length: int,
        like: Tensor,
        marks_absent: bool = False,
    ) -> None:
        sizes = [shape[i] for pair in kinds for shape in pair for i in (1, 3)]
        if not all(isinstance(size, int) for size in sizes):
            raise UsageError("the sizes of a cache layer are known only when the model runs")
        self.length, self.marks_absent = length, marks_absent
        self.lengths = [0] * slots
        # unwritten positions are read with weight 0, so they must be finite
        self.keys, self.values = (
            [like.new_zeros(trips, slots, shape[i][1], length, shape[i][3]) for shape in kinds]
            for i in (0, 1)
        )

    def fill(self, slot: int, cache: Any, length: int) -> None:
        """Copy the cache of a prompt, a batch of one row, into a slot."""
        for number, pair in enumerate(zip(self.keys, self.values, strict=True)):
            for trip in range(len(pair[0])):
                layer = cache.layers[trip * len(self.keys) + number]
                for whole, part in zip(pair, (layer.keys, layer.values), strict=True):
                    held = part.shape[2]
                    whole[trip, slot, :, length - held : length] = part[0]
            if self.marks_absent:
                pair[0][:, slot, :, length:, -1] = ABSENT
        self.lengths[slot] = length

    def store(self, number: int, at: KeyPositions, k: Tensor, v: Tensor) -> None:
        """Write the keys and values [rows, kv_heads, 1, size] of tokens to their positions."""
        trips, slots, positions = at.index
        self.keys[number][trips, slots, :, positions] = k[:, :, 0]
        self.values[number][trips, slots, :, positions] = v[:, :, 0]

    def attend(
        self,
        number: int,
        at: KeyPositions,
        q: Tensor,
        scale: float,
        windows: Sequence[int | None],
        softcap: float | None,
    ) -> Tensor:
        """Compute attention of new tokens over their own requests' caches.

        `q` is [rows, heads, 1, size]. Returns [rows, 1, heads, size].
        """
        keys, values = self.keys[number], self.values[number]
        longest, (trips, slots, _) = at.longest, at.index
        if softcap is None and len(at.trips) * longest <= TOGETHER:
            k, v = (t[trips, slots, :, :longest] for t in (keys, values))
            grouped = q.unflatten(1, (keys.shape[2], -1)).squeeze(3)
            out = F.scaled_dot_product_attention(grouped, k, v, at.mask(windows), scale=scale)
            return out.flatten(1, 2)[:, None]
        rows = []
        for row, (trip, slot) in enumerate(zip(at.trips, at.slots, strict=True)):
            stop, window = at.positions[row] + 1, windows[row]
            start = 0 if window is None else max(0, stop - window)
            k, v = (t[trip, slot, None, :, start:stop] for t in (keys, values))
            rows.append(attend(q[row : row + 1], k, v, scale, False, None, softcap))
        return torch.cat(rows)
