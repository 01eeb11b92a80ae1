"""From a cold start to compiled: one body for all trips, beside `torch.compile` of the original.

    python -m benchmarks.compile_time [--model DIR] [--json FILE]

Each side runs in a process of its own with an empty compiler cache. The rolled model compiles its
trips, which share one code object; the original is compiled as a whole. What the compiler does once
whatever it compiles (it looks for the C++ toolchain and prepares headers) is measured apart, with a
function of two operations, and is in neither figure.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from typing import Any

import torch

import reroll
from benchmarks.harness import MODEL, Table, original, parse_options, run_process


def compile_once(side: str, model: str) -> None:
    """Time the first compiled forward of one side, and print it as JSON."""
    ids = torch.randint(0, 1000, (1, 64))
    start = time.perf_counter()
    torch.compile(lambda x: x.sin().sum())(torch.ones(64, 64))
    toolchain = time.perf_counter() - start
    run: Any
    if side == "reroll":
        run = reroll.capture(model, dtype="float32").to_module().eval()
        start = time.perf_counter()
        run.compile_trips()
    else:
        whole = original(model)
        start = time.perf_counter()
        run = torch.compile(whole)
    with torch.no_grad():
        run(input_ids=ids, use_cache=False)
    print(json.dumps({"seconds": time.perf_counter() - start, "once, seconds": toolchain}))


def main() -> None:
    """A row for each side; the ratio is transformers' seconds over the side's."""
    options = parse_options(__doc__, model=MODEL, threads=2, side="")
    if options.side:
        compile_once(options.side, options.model)
        return
    columns = {"": "{}", "seconds": "{:.1f}", "once, seconds": "{:.1f}", "ratio": "{:.1f}"}
    table = Table(options, columns)
    for case in table.missing([{"": "transformers"}, {"": "reroll"}]):
        words = [sys.executable, "-m", "benchmarks.compile_time", "--side", case[""]]
        words += ["--model", options.model, "--threads", str(options.threads)]
        with tempfile.TemporaryDirectory() as cache:
            output = run_process(words, options.threads, TORCHINDUCTOR_CACHE_DIR=cache)["output"]
        row = case | json.loads(output.splitlines()[-1])
        peer = table.rows[0]["seconds"] if table.rows else row["seconds"]
        table.add(row | {"ratio": peer / row["seconds"]})


if __name__ == "__main__":
    main()
