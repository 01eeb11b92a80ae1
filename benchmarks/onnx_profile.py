"""Where a decoded token's time goes in ONNX Runtime, by the profiler of ONNX Runtime itself.

    python -m benchmarks.onnx_profile FILE.onnx... [--model DIR] [--context 128] [--threads 1]

Milliseconds of a token in the products of the blocks, in the output matrix, and in each other kind
of operator; `run` is the whole of it. The first row is what opening the graph took of memory: the
weights as the runtime packs them. The profiler reads the clock: on a machine that others use,
look at the shares.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from benchmarks.onnx_speed import Graph

PRODUCTS = ("MatMul", "MatMulNBits", "Gemm")
SKIPPED, STEPS = 4, 24
MEMORY = "memory, MB"


def resident() -> float:
    """MB of memory of this process that are not files."""
    line = next(x for x in Path("/proc/self/status").read_text().split("\n") if "RssAnon" in x)
    return int(line.split()[1]) * 1024 / 1e6


def profiled(path: Path, options: argparse.Namespace, config: Any) -> Counter[str]:
    """Milliseconds of a token by what they went into."""
    with tempfile.TemporaryDirectory() as folder:
        before = resident()
        graph = Graph(path, options.threads, config, profile=f"{folder}/profile")
        taken = resident() - before
        graph.fill(options.context)
        for _ in range(SKIPPED + STEPS):
            graph.step()
        events = json.loads(Path(graph.session.end_profiling()).read_text())
    runs = [e for e in events if e["name"] == "model_run"][-STEPS:]
    found: Counter[str] = Counter(run=sum(e["dur"] for e in runs))
    for event in events:
        if event.get("cat") != "Node" or event["ts"] < runs[0]["ts"]:
            continue
        kind = event["args"]["op_name"]
        # the time of a Loop has that of its nodes in it, which are listed as well
        if kind in PRODUCTS:
            shapes = str(event["args"].get("output_type_shape"))
            kind = "head" if str(config.vocab_size) in shapes else "products of blocks"
        found[kind] += event["dur"]
    return Counter({name: spent / STEPS / 1e3 for name, spent in found.items()} | {MEMORY: taken})


def main() -> None:
    """Print a table with one column for each graph."""
    parser = argparse.ArgumentParser()
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, default=12)
    options = parser.parse_args()
    config = AutoConfig.from_pretrained(options.model)
    # a process for each, so that none finds memory that another has given back
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        asked = [(path, options, config) for path in options.files]
        columns = pool.starmap(profiled, asked, chunksize=1)
    names = [f"{path.parent.name} {path.stem}" for path in options.files]
    print("| ms of a token | " + " | ".join(names) + " |")
    print("| --- |" + " ---: |" * len(names))
    together = sum(columns, Counter[str]())
    for kind, _ in together.most_common(options.rows):
        print(f"| {kind} | " + " | ".join(f"{column[kind]:.2f}" for column in columns) + " |")


if __name__ == "__main__":
    main()
