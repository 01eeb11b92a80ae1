"""Which layers a pass changes: the options `layers` and `keep`, and what they come to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from reroll.errors import UsageError

Layers = list[int] | Literal["all"]
Keep = list[int] | int | float | str | None

AUTO = "auto:"


def choose(count: int, layers: Layers, keep: Keep, owner: str) -> list[int]:
    """The layers to change of `count`: those of `layers` that `keep` does not keep.

    A `keep` that has to be measured (see `measured_part`) keeps nothing here. Raises UsageError for
    a layer that there is not, and if nothing is left.
    """
    where = f"pass {owner}"
    chosen = range(count) if layers == "all" else layers
    if isinstance(keep, bool) or (isinstance(keep, int) and keep < 1):
        raise UsageError("a period is 1 or more", f"{where}, option keep")
    kept: Sequence[int] = ()
    if isinstance(keep, int):
        # the last of each group, so that the layers before it have made what it looks at
        kept = range(keep - 1, count, keep)
    elif isinstance(keep, list):
        kept = keep
    for name, given in (("layers", chosen), ("keep", kept)):
        wrong = [n for n in given if not 0 <= n < count]
        if wrong:
            raise UsageError(
                f"there is no layer {wrong[0]}", f"{where}, option {name}", f"0 to {count - 1}"
            )
    left = sorted(set(chosen) - set(kept))
    if not left:
        raise UsageError("all layers are kept, so there is nothing to do", where)
    return left


def measured_part(keep: Keep, owner: str) -> float | None:
    """The part of the layers that stays by measurement: 0.25, or "auto:0.25"; None for no such."""
    part: float | None = None
    if isinstance(keep, float):
        part = keep
    elif isinstance(keep, str):
        text = keep.removeprefix(AUTO)
        try:
            part = float(text) if text != keep else None
        except ValueError:
            part = None
        if part is None:
            raise UsageError(
                f"keep is not {keep!r}",
                f"pass {owner}, option keep",
                'layer numbers such as [3, 9], a period such as 7, or "auto:0.25"',
            )
    if part is not None and not 0 < part < 1:
        raise UsageError(
            f"the part of the layers that stays is between 0 and 1, not {part}",
            f"pass {owner}, option keep",
        )
    return part


def ranges(numbers: Sequence[int]) -> str:
    """Layer numbers for people: "0-6, 8-13"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
