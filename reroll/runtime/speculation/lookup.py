"""What followed the last tokens before, in NumPy: see `Lookup` in `drafts`."""

from __future__ import annotations

from typing import Any

import numpy as np

# how many of the last tokens are looked for, at most and at least
LONGEST, SHORTEST = 3, 2


def followed(row: Any, count: int, matches: int = 1) -> list[Any]:
    """Return what followed the last tokens of a row [time] before: up to `count` tokens each.

    Prompt lookup decoding (Saxena 2023): the longest of the last 3 to 2 tokens that came before, at
    its last places, the latest first. Without a place, there is one array without tokens.
    """
    found: list[Any] = []
    for size in range(LONGEST, SHORTEST - 1, -1):
        if len(row) <= size:
            continue
        places = np.lib.stride_tricks.sliding_window_view(row, size)[:-1]
        (same,) = (places == row[-size:]).all(1).nonzero()
        for start in (same[::-1] + size).tolist():
            new = row[start : start + count]
            if not any(np.array_equal(new, old[: len(new)]) for old in found):
                found.append(new)
            if len(found) == matches:
                break
        if found:
            break
    return found or [row[:0]]
