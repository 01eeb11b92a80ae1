"""Compile the configurations of the manifest, print measures of them, and fail on a spill.

    python -m reroll.kernels.audit [--targets sm_90,...] [--families ...] [--sizes 64,...]
        [--summary | --json]

Registers, spills, shared memory and matrix instructions are read from the binaries, which are built
without a GPU. `--summary` prints a line for each GPU and family, and failures. Exits with 1 if a
shipped configuration spills, does not fit, or does not compile.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from reroll.kernels.audit.families import FAMILIES
from reroll.kernels.audit.workers import Worker
from reroll.kernels.configurations import TARGETS, manifest

SUMMARY = ("GPU", "family", "configurations", "kernels", "spilled", "registers, the most",
           "shared memory, the most, KiB", "matrix instr., the fewest")  # fmt: skip
HEAD = ("configuration", "kernel", "registers", "spilled", "shared", "matrix instr.", "verdict")


def audit(targets: list[str], families: list[str], sizes: list[str]) -> list[dict[str, Any]]:
    """Measure each kernel of each shipped configuration that was selected, one record for each."""
    records = []
    with Worker() as worker:
        for at, entry in manifest().items():
            name, target, numbers, gate, size, limit = at.split("/")
            if name not in families or target not in targets or (sizes and size not in sizes):
                continue
            variant = {
                "numbers": numbers, "gate": int(gate.removeprefix("gate")), "size": int(size),
                "limit": int(limit),
            }  # fmt: skip
            answer = worker.ask(
                do="measure", family=name, variant=variant, target=target, tiles=entry["tiles"]
            )
            for kernel, measured in answer["found"].items():
                records.append({"configuration": at, "kernel": kernel, **measured})
    return records


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--sizes", default="", help="head sizes; all if none")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--summary", action="store_true", help="a line for each GPU and family")
    form.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    sizes = [s for s in chosen.sizes.split(",") if s]
    records = audit(chosen.targets.split(","), chosen.families.split(","), sizes)
    bad = [r for r in records if r["problem"]]
    if chosen.json:
        sys.stdout.write(json.dumps(records, indent=1) + "\n")
    else:
        sys.stdout.write(summary(records) if chosen.summary else table(records))
        if chosen.summary and bad:
            sys.stdout.write(f"\n{table(bad)}")
        sys.stdout.write(f"{len(records)} kernels, {len(bad)} that must not be shipped\n")
    # an empty selection proves nothing
    sys.exit(1 if bad or not records else 0)


def table(records: list[dict[str, Any]]) -> str:
    """Return the records as a Markdown table."""
    lines = []
    for r in records:
        numbers = (r["registers"], r["spilled"], r["shared"], r["tensor_core"])
        lines.append((r["configuration"], r["kernel"], *map(str, numbers), r["problem"] or "ok"))
    return _markdown(HEAD, lines)


def summary(records: list[dict[str, Any]]) -> str:
    """Return a Markdown table of the records by GPU and family.

    Matrix instructions are counted in bf16 and tf32, where a family has any; `spilled` counts
    kernels.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for r in records:
        family, target, *_ = r["configuration"].split("/")
        groups.setdefault((target, family), []).append(r)
    lines = []
    for (target, family), group in sorted(groups.items(), key=lambda g: TARGETS.index(g[0][0])):
        narrow = [r["tensor_core"] for r in group if "/ieee/" not in r["configuration"]]
        numbers = (
            len({r["configuration"] for r in group}),
            len(group),
            sum(r["spilled"] > 0 for r in group),
            max(r["registers"] for r in group),
            -(-max(r["shared"] for r in group) // 1024),
        )
        fewest = str(min(narrow)) if any(narrow) else "none"
        lines.append((target, family, *map(str, numbers), fewest))
    return _markdown(SUMMARY, lines)


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    main()
