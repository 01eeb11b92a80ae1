"""What followed the last tokens before, in NumPy: see `Lookup` in `drafts`."""

from __future__ import annotations

from typing import Any

import numpy as np

# how many of the last tokens are looked for, at most and at least
LONGEST, SHORTEST = 3, 2


def following(row: Any, count: int) -> Any:
    """Return up to `count` tokens that followed the last ones of a row [time] where they last were.

    Prompt lookup decoding (Saxena 2023): the longest of the last 3 to 2 tokens that came before.
    """
    for size in range(LONGEST, SHORTEST - 1, -1):
        if len(row) <= size:
            continue
        places = np.lib.stride_tricks.sliding_window_view(row, size)[:-1]
        (same,) = (places == row[-size:]).all(1).nonzero()
        if len(same):
            start = int(same[-1]) + size
            return row[start : start + count]
    return row[:0]
