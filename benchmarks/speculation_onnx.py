"""Decoding exported models with drafts beside decoding without, on ONNX Runtime."""

from __future__ import annotations

import json
import statistics
import sys
from argparse import Namespace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from benchmarks.harness import TEXT, Row, Table, run_process
from reroll.onnx.runner import Runner, Sequence, load

# a process of its own: what it takes of memory is of one export
EXPORT = """
import json, pathlib, sys, reroll, reroll.writing, reroll.export.onnx
model, draft, out, options = json.loads(sys.argv[1])
program = reroll.capture(model, dtype="float32")
program = program.with_draft(program.twin(draft))
with reroll.writing.new_directory(pathlib.Path(out)) as directory:
    reroll.export.onnx.Onnx(**options).write(program, directory)
print(json.dumps({}))
"""


def exported(case: Row, options: Namespace) -> Path:
    """The directory of a model and its draft, made if it is not there."""
    name = f"{case['model']}-{case['precision']}-{options.runtime}-{options.passes}"
    out = Path(options.work, name.replace(" ", ""))
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        settings = {"graphs": ["unrolled"], "precision": case["precision"]}
        settings["runtime"] = options.runtime
        given = json.dumps([f"models/{case['model']}", options.passes, str(out), settings])
        run_process([sys.executable, "-c", EXPORT, given])
    return out


@cache
def opened(directory: Path, threads: int) -> Runner:
    """A runner of an export."""
    return load(directory, threads=threads)


@cache
def passage(directory: Path, text: str, number: int, length: int) -> Any:
    """Tokens [length] of a file, other ones for each number."""
    characters = (TEXT / text).read_text(encoding="utf-8")[number * 10 * length :][: 10 * length]
    ids = AutoTokenizer.from_pretrained(directory)(characters)["input_ids"]
    return np.array(ids[:length], np.int64)


@lru_cache(maxsize=2)
def begun(directory: Path, threads: int, text: str, number: int, length: int) -> Sequence:
    """The sequence of a passage without its last token, for all drafts."""
    sequence = opened(directory, threads).sequence()
    sequence.tokens = passage(directory, text, number, length).tolist()
    sequence.state.extend(sequence.tokens[:-1], 0)
    return sequence


def compare(table: Table, options: Namespace) -> None:
    """Decode each passage with each draft, and without one before and after."""
    for case in table.missing():
        rows = [one(case, options, number) for number in range(options.passages)]
        found = {k: statistics.median(row[k] for row in rows) for k in rows[0]}
        parted = sum(row["parted"] for row in rows)
        table.add(case | found | {"parted": parted, "gap": max(row["gap"] for row in rows)})


def one(case: Row, options: Namespace, number: int) -> Row:
    """One passage: plain, with the draft, plain."""
    directory = exported(case, options)
    runner, given = opened(directory, options.threads), (options.text, number, case["context"])
    ids, start = passage(directory, *given), begun(directory, options.threads, *given)
    found, reports = [], []
    for draft in (None, case["draft"], None):
        found.append(runner.generate(ids, options.tokens, draft, ends=(), sequence=start.copy()))
        reports.append(runner.report)
    before, report, after = reports
    assert before is not None
    assert report is not None
    assert after is not None
    rate = options.tokens / statistics.mean([before.seconds, after.seconds])
    proposed, accepted = (sum(x) for x in zip(*report.drafts.values(), strict=True))
    plain, tokens = found[:2]
    first, gap = int((plain == tokens).cumprod().sum()), 0.0
    if first < len(plain):
        state = start.state.copy()
        best = np.sort(state.extend(plain[state.read : first].tolist(), 1)[-1])[-2:]
        gap = float((best[1] - best[0]) / abs(best[1]))
    return {
        "plain, tokens/s": rate,
        "ratio": options.tokens / report.seconds / rate,
        "tokens a step": report.tokens / report.steps,
        "accepted": accepted / max(proposed, 1),
        "parted": int(first < len(plain)),
        "gap": gap,
    }
