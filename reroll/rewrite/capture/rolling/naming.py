"""Names for a rolled loop and its stacked weights, taken from the original's modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from reroll.rewrite.capture.rolling.unify import Unifier


class Names:
    """Name of a loop, names of its stacked weights, and the number of layers in a trip.

    `model.layers.0.mlp.up_proj.weight` and the same weight of the other trips become
    `model.layers.*.mlp.up_proj.weight`. With several layers in a trip, or where the first trip is
    not layer 0, it becomes `<loop>.trips.*.<i>.mlp.up_proj.weight`. Here `i` numbers the layers of
    a trip.
    """

    def __init__(self, unified: Unifier, taken: set[str], weights: Mapping[str, Any]) -> None:
        split = {first: _split(names) for first, names in unified.stacks.items()}
        prefixes = Counter(parts[0] for parts in split.values() if parts is not None)
        common = prefixes.most_common(1)[0][0] if prefixes else _common_prefix(list(unified.stacks))
        name = common or f"loop{len(taken) - 1}"
        self.loop = name
        while self.loop in taken:
            self.loop += "_"
        layers = sorted({parts[1] for parts in split.values() if parts and parts[0] == common})
        # trips that start in the middle of a layer share it with the next trip, so count it once
        touched = {
            number
            for first, names in unified.stacks.items()
            if (parts := split[first]) and parts[0] == common
            for number in _numbers(names)
        }
        self.period = max(len(touched) // unified.trips, 1)
        plain = len(layers) == 1 and layers == [0] and self.loop == common
        self.renamed: dict[str, str] = {}
        for first, parts in split.items():
            if parts is None and common and first.startswith(f"{common}."):
                new = f"{self.loop}.*.{first.removeprefix(common + '.')}"
            elif parts is not None and parts[0] == common and plain:
                new = f"{common}.*.{parts[2]}"
            elif parts is not None and parts[0] == common:
                new = f"{self.loop}.trips.*.{layers.index(parts[1])}.{parts[2]}"
            else:
                new = f"{self.loop}.trips.*.{first}"
            while new in self.renamed.values() or new in weights:
                new += "_"
            self.renamed[first] = new


def layers_per_trip(unified: Unifier) -> int:
    """Count the numbered modules that a trip's weights come from; 1 if none is numbered."""
    split = [_split(names) for names in unified.stacks.values()]
    numbers: dict[str, set[int]] = {}
    for parts in split:
        if parts is not None:
            numbers.setdefault(parts[0], set()).add(parts[1])
    return max(map(len, numbers.values()), default=1)


def _numbers(names: tuple[str, ...]) -> list[int]:
    """Return, for each name, the number in which the names differ."""
    parts = [name.split(".") for name in names]
    at = next(i for i, column in enumerate(zip(*parts, strict=True)) if len(set(column)) > 1)
    return [int(p[at]) for p in parts]


def _split(names: tuple[str, ...]) -> tuple[str, int, str] | None:
    """Return (prefix, number in the first name, rest) if the names differ in one number only."""
    if len(set(names)) == 1:
        return None
    parts = [name.split(".") for name in names]
    if len({len(p) for p in parts}) != 1:
        return None
    differing = [i for i, column in enumerate(zip(*parts, strict=True)) if len(set(column)) > 1]
    if len(differing) != 1 or not all(p[differing[0]].isdigit() for p in parts):
        return None
    at = differing[0]
    return ".".join(parts[0][:at]), int(parts[0][at]), ".".join(parts[0][at + 1 :])


def _common_prefix(names: list[str]) -> str:
    """Return the module path that all names share."""
    shared = []
    for column in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return ".".join(shared)
