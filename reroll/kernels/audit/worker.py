"""A process that compiles: it reads jobs as lines of JSON, and answers each with a line.

Jobs: {"do": "choose", "family", "variant", "target"} finds tiles; {"do": "measure", ..., "tiles"}
compiles given ones. Triton must not be interpreting, so this is a process of its own.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

from reroll.kernels.audit.candidates import Variant
from reroll.kernels.audit.compiling import Measured, compiled, launches
from reroll.kernels.audit.families import FAMILIES, KERNEL_NAMES, Family
from reroll.kernels.configurations import CHUNKS, Tiles


def measure(family: Family, variant: Variant, tiles: Tiles, target: str) -> dict[str, Measured]:
    """Measure every kernel of a family with these tiles."""
    return {name: _one(family, variant, tiles, name, target) for name in tiles}


def choose(family: Family, variant: Variant, target: str) -> tuple[Tiles, dict[str, Measured]]:
    """Find the first plan and chunk for which each kernel has tiles without spills.

    Both results are empty if there is none.
    """
    for plan in family.plans(variant):
        for bt in (c for c in CHUNKS if c <= variant.limit):
            tiles: Tiles = {}
            measured: dict[str, Measured] = {}
            for name in plan:
                for tile in family.candidates(name, bt, variant):
                    rest = {
                        other: tile | ({"BK": variant.size} if "BK" in tile else {})
                        for other in plan
                    }
                    one = _one(family, variant, rest | {name: tile}, name, target)
                    if not one.problem(target):
                        tiles[name], measured[name] = tile, one
                        break
                else:
                    break
            if len(tiles) == len(plan):
                return tiles, measured
    return {}, {}


def _one(family: Family, variant: Variant, tiles: Tiles, name: str, target: str) -> Measured:
    """Measure a kernel for each number of query heads per state, and combine the worst."""
    measured = []
    for groups in family.groups:
        measured.append(_built(family, replace(variant, groups=groups), tiles, name, target))
        if measured[-1].problem(target):
            return measured[-1]
    return Measured(
        max(m.registers for m in measured),
        shared=max(m.shared for m in measured),
        tensor_core=min(m.tensor_core for m in measured),
    )


def _built(family: Family, variant: Variant, tiles: Tiles, name: str, target: str) -> Measured:
    wanted = KERNEL_NAMES.get(name, name)
    for launch in launches(lambda: family.call(variant, tiles)):
        if launch[0].fn.__name__ == wanted:
            return compiled(launch, target)
    return Measured(error=f"{family.name} does not launch {wanted}")


def main() -> None:
    """Answer the jobs of standard input."""
    for line in sys.stdin:
        job = json.loads(line)
        family, variant = FAMILIES[job["family"]], Variant(**job["variant"])
        tiles: Any = job.get("tiles")
        if job["do"] == "choose":
            tiles, measured = choose(family, variant, job["target"])
        else:
            measured = measure(family, variant, tiles, job["target"])
        answer = {"tiles": tiles, "found": {k: m.data(job["target"]) for k, m in measured.items()}}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
