"""transformers' own model tests, on lowered models beside their originals.

Of each kind in `tests/peer/kinds.py`: how many tests pass, fail and are skipped, and which of those
that the original passes fail or are skipped. The file of results has each of these tests, with the
last line of its error or the reason. `python -m tools.peer_tests` fetches the tests first, and
`python -m tests.peer KIND TEST` runs one of them. With `--against FILE`, tests that fail and do not
in that file are named at the end, and are an error.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.harness import Row, Table, parse_options, run_process

COLUMNS = {
    "kind": "{}",
    "passed": "{:d}",
    "failed": "{:d}",
    "skipped": "{:d}",
    "the original's": "{}",
    "failing that it passes": "{:d}",
    "skipped that it passes": "{:d}",
}

# a test, to how it ended and why
Results = dict[str, tuple[str, str]]


def main() -> None:
    """Add a row for each kind."""
    from tests.peer.kinds import KINDS

    options = parse_options(__doc__, "kinds*", against=Path)
    table = Table(options, COLUMNS)
    for case in table.missing({"kind": kind} for kind in options.kinds or KINDS):
        table.add(row_of(case["kind"], KINDS))
    if options.against and (new := newly_failing(table.rows, options.against)):
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
    passes = [test for test, (state, _) in theirs.items() if state == "passed"]
    failing, skipped = (
        {test: why for test in passes if (ended := ours[test])[0] == state and (why := ended[1])}
        for state in ("failed", "skipped")
    )
    counts = Counter(state for state, _ in ours.values())
    of_theirs = Counter(state for state, _ in theirs.values())
    states = ("passed", "failed", "skipped")
    return {
        "kind": name,
        **{state: counts[state] for state in states},
        "the original's": " / ".join(str(of_theirs[state]) for state in states),
        "failing that it passes": len(failing),
        "skipped that it passes": len(skipped),
        "failing": failing,
        "skipped here alone": skipped,
        "failing in both": [t for t, (s, _) in theirs.items() if s == ours[t][0] == "failed"],
        "passing here alone": [
            t for t, (s, _) in ours.items() if s == "passed" and theirs[t][0] == "failed"
        ],
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
    main()
