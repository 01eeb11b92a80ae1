"""Compile what the manifest ships, print what came out, and fail on a spill.

    python -m reroll.kernels.audit [--targets sm_90,...] [--families ...] [--sizes 64,...] [--json]

Registers, spills, shared memory and matrix instructions are read from the binaries, which are built
with no GPU. Exits with 1 if a shipped configuration spills, does not fit, or does not compile.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from reroll.kernels.audit.families import FAMILIES
from reroll.kernels.audit.workers import Worker
from reroll.kernels.configurations import TARGETS, manifest

HEAD = ("configuration", "kernel", "registers", "spilled", "shared", "matrix instr.", "verdict")


def audit(targets: list[str], families: list[str], sizes: list[str]) -> list[dict[str, Any]]:
    """One record for each kernel of each shipped configuration that was asked for."""
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
            for kernel, found in answer["found"].items():
                records.append({"configuration": at, "kernel": kernel, **found})
    return records


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--sizes", default="", help="head sizes; all if none")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    sizes = [s for s in chosen.sizes.split(",") if s]
    records = audit(chosen.targets.split(","), chosen.families.split(","), sizes)
    bad = [r for r in records if r["problem"]]
    if chosen.json:
        sys.stdout.write(json.dumps(records, indent=1) + "\n")
    else:
        sys.stdout.write(table(records))
        sys.stdout.write(f"{len(records)} kernels, {len(bad)} that must not be shipped\n")
    # a selection that is empty shows nothing
    sys.exit(1 if bad or not records else 0)


def table(records: list[dict[str, Any]]) -> str:
    """The records as a Markdown table."""
    lines = [HEAD, tuple("---" for _ in HEAD)]
    for r in records:
        numbers = (r["registers"], r["spilled"], r["shared"], r["tensor_core"])
        lines.append((r["configuration"], r["kernel"], *map(str, numbers), r["problem"] or "ok"))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    main()
