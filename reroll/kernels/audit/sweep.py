"""Choose tiles for every kernel, shape and GPU, and write the manifest.

    python -m reroll.kernels.audit.sweep [--targets sm_90,...] [--families ...] [--sizes 64,...]
        [--only ENTRY,...]

For each variant the first candidates in order of preference are taken that neither spill nor need
more shared memory than a GPU has. Variants without such a candidate get no entry, and the
dispatcher chooses another form for them. Nothing is timed, because there may be no GPU.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import triton

from reroll.kernels.audit.families import FAMILIES
from reroll.kernels.audit.workers import Worker
from reroll.kernels.configurations import TARGETS, key

MANIFEST = Path(__file__).parents[1] / "manifest.json"

log = logging.getLogger(__name__)


def sweep(
    families: list[str], targets: list[str], sizes: list[str], only: Sequence[str] = ()
) -> None:
    """Write entries of the manifest for these families and targets, each as it is found.

    `only` names the entries to choose again, if not all.
    """
    with Worker() as worker:
        for target in targets:
            for name in families:
                for variant in FAMILIES[name].variants:
                    if sizes and str(variant.size) not in sizes:
                        continue
                    at = key(name, target, variant.numbers, variant.gate, variant.size,
                             variant.limit)  # fmt: skip
                    if only and at not in only:
                        continue
                    answer = worker.ask(
                        do="choose", family=name, variant=asdict(variant), target=target
                    )
                    entry = {"tiles": answer["tiles"], "registers": _registers(answer)}
                    _note(at, entry if answer["tiles"] else None)


def _note(at: str, entry: dict[str, Any] | None) -> None:
    """Set an entry of the manifest, or remove it where no candidate works."""
    entries = json.loads(MANIFEST.read_text("utf-8"))["entries"] if MANIFEST.exists() else {}
    if entry is None:
        log.warning("%s: no candidate without spills", at)
        entries.pop(at, None)
    else:
        log.info("%s: %s", at, entry["registers"])
        entries[at] = entry
    data = {"triton": triton.__version__, "entries": dict(sorted(entries.items()))}
    MANIFEST.write_text(_text(data), encoding="utf-8")


def _registers(answer: dict[str, Any]) -> dict[str, int]:
    return {name: one["registers"] for name, one in answer["found"].items()}


def main() -> None:
    """Sweep the selected entries, and keep the others in the manifest."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--sizes", default="", help="head sizes; all if none")
    parser.add_argument("--only", default="", help="entries of the manifest; all if none")
    chosen = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    families, targets = chosen.families.split(","), chosen.targets.split(",")
    sizes = [s for s in chosen.sizes.split(",") if s]
    sweep(families, targets, sizes, [s for s in chosen.only.split(",") if s])


def _text(data: dict[str, Any]) -> str:
    """Return JSON with one entry on each line."""
    lines = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in data["entries"].items()]
    body = ",\n".join(lines)
    return f'{{\n "triton": {json.dumps(data["triton"])},\n "entries": {{\n{body}\n }}\n}}\n'


if __name__ == "__main__":
    main()
