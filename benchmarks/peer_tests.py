"""transformers' own model tests, on lowered models: see the file of cases."""

from __future__ import annotations

import json
import sys
import tempfile
from argparse import Namespace
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.__main__ import main
from benchmarks.harness import Row, Table, run_process

STATES = ("passed", "failed", "skipped")
# a test, to how it ended and why
Results = dict[str, tuple[str, str]]


def measure(table: Table, options: Namespace) -> None:
    """Add a row for each kind."""
    from tests.peer.kinds import KINDS

    for case in table.missing({"kind": kind} for kind in options.name[1:] or KINDS):
        table.add(row_of(case["kind"], KINDS))
    if options.against and (new := newly_failing(table.rows, Path(options.against))):
        raise SystemExit("\n".join(["these fail, and do not in the file:", *new]))


def newly_failing(rows: Sequence[Row], file: Path) -> list[str]:
    """The tests that fail in rows and not in those of a file, with the commands that show why."""
    kept = json.loads(file.read_text(encoding="utf-8"))["rows"]
    known = {row["kind"]: row["failing"] for row in kept}
    return [
        f"python -m tests.peer {row['kind']!r} {test}"
        for row in rows
        for test in row["failing"]
        if test not in known.get(row["kind"], ())
    ]


def row_of(name: str, kinds: Mapping[str, Any]) -> Row:
    """The row of a kind: its tests and those of its original, each side in a process of its own."""
    # kinds of one original share its run
    first = next(other for other in kinds if kinds[other].original is kinds[name].original)
    theirs, ours = results(first, original=True), results(name, original=False)
    counts, of_theirs = (Counter(state for state, _ in side.values()) for side in (ours, theirs))
    # how each test ends there, how it ends here, and why
    ends = [(test, state, *ours[test]) for test, (state, _) in theirs.items()]
    failing, skipped = (
        {test: why for test, there, here, why in ends if (there, here) == ("passed", state)}
        for state in ("failed", "skipped")
    )
    return {
        "kind": name,
        **{state: counts[state] for state in STATES},
        "the original's": " / ".join(str(of_theirs[state]) for state in STATES),
        "failing that it passes": len(failing),
        "skipped that it passes": len(skipped),
        "failing": failing,
        "skipped here alone": skipped,
        "failing in both": [t for t, there, here, _ in ends if there == here == "failed"],
        "passing here alone": [t for t, *both, _ in ends if both == ["failed", "passed"]],
    }


@cache
def results(kind: str, *, original: bool) -> Results:
    """How the tests of one side of a kind end."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "results.json")
        words = [sys.executable, "-m", "tests.peer", kind, "--json", file]
        run_process([*words, *(["--original"] if original else [])], TRANSFORMERS_VERBOSITY="error")
        found = json.loads(file.read_text(encoding="utf-8"))
    return {test: (state, why) for test, (state, why) in found.items()}


if __name__ == "__main__":
    main(["peer_tests", *sys.argv[1:]])
