"""Selection of the layers that a pass changes, by the options `layers` and `keep`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Literal

from reroll.bounds import BETWEEN, COUNT, COUNT_OR_NONE, check_number
from reroll.errors import UsageError

Layers = list[int] | Literal["all"]
Keep = list[int] | int | float | str | None

AUTO = "auto:"


def check_keep(keep: Keep, where: str) -> None:
    """Raise UsageError for a `keep` that is invalid for every model."""
    part = measured_part(keep)
    if part is not None:
        check_number("the part of the layers that stays", part, BETWEEN, where, integer=False)
    elif isinstance(keep, str):
        raise UsageError(
            f"keep is not {keep!r}",
            where,
            'layer numbers such as [3, 9], a period such as 7, or "auto:0.25"',
        )
    elif isinstance(keep, list):
        for number in keep:
            check_number("a layer that stays", number, COUNT_OR_NONE, where)
    elif keep is not None:
        check_number("a period", keep, COUNT, where)


def choose(count: int, layers: Layers, keep: Keep, owner: str) -> list[int]:
    """Select the layers to change of `count`: those of `layers` without those of `keep`.

    A `keep` by measurement (see `measured_part`) keeps no layer here. Raises UsageError for a
    missing layer, and if no layer is left.
    """
    where = f"pass {owner}"
    chosen = range(count) if layers == "all" else layers
    kept: Sequence[int] = ()
    if isinstance(keep, int):
        # the last layer of each group, so that it reads the output of the changed layers
        kept = range(keep - 1, count, keep)
    elif isinstance(keep, list):
        kept = keep
    for name, numbers in (("layers", chosen), ("keep", kept)):
        wrong = [n for n in numbers if not 0 <= n < count]
        if wrong:
            raise UsageError(
                f"there is no layer {wrong[0]}", f"{where}, option {name}", f"0 to {count - 1}"
            )
    left = sorted(set(chosen) - set(kept))
    if not left:
        raise UsageError("all layers are kept, so there is nothing to do", where)
    return left


def measured_part(keep: Keep) -> float | None:
    """Return the fraction of layers kept by measurement: 0.25 or "auto:0.25"; else None."""
    if isinstance(keep, float):
        return keep
    if isinstance(keep, str) and keep.startswith(AUTO):
        with suppress(ValueError):
            return float(keep.removeprefix(AUTO))
    return None


def ranges(numbers: Sequence[int]) -> str:
    """Format layer numbers as ranges: "0-6, 8-13"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
