"""The depth loop."""

from __future__ import annotations

from typing import Any


def loop(body: str, carry: tuple[Any, ...], inputs: tuple[Any, ...], trips: int) -> tuple[Any, ...]:
    """Run the Program's body of this name `trips` times: the depth loop.

    The body's first placeholders take the `carry`, which each trip returns for the next one. Each
    further placeholder takes one of `inputs`: a value that is the same for all trips, or a tuple
    with one value per trip. Weights of the body are stacked in the Program's table: each names the
    entry that a trip uses. Returns the last trip's carry.
    """
    raise RuntimeError("a loop is run by the lowered module, not by the graph alone")
