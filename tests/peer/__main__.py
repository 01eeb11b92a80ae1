"""Runs transformers' tests on one kind: `python -m tests.peer KIND [TEST ...] [--original]`.

With parts of tests' names, these tests alone, and with the whole error of each.
"""

import argparse
import json
from pathlib import Path

import torch

from tests.peer.distribution import COMMAND, fetched
from tests.peer.kinds import KINDS
from tests.peer.suites import case_of, last_line, names_of, outcome


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=list(KINDS))
    parser.add_argument("tests", nargs="*")
    parser.add_argument("--original", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not fetched():
        raise SystemExit(f"transformers' tests are not there: {COMMAND}")
    torch.set_num_threads(1)
    case = case_of(options.kind, lowered=not options.original)
    found = {}
    for name in names_of(case, options.tests):
        state, said = outcome(case, name)
        line = last_line(said) if state == "failed" else said
        found[name] = [state, line]
        print(f"{state:8} {name}  {said if options.tests else line}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
