"""What a cached block of weights is worth: products with one vector, by how much they read in turn.

    python -m benchmarks.cache_reach [--precisions fp32,int8] [--threads 1] [--rounds 12]

Sixty pairs of matrices of SmolLM2's sizes (576 to 1,536 and back) multiply one token in ONNX
Runtime. The pairs are the same few over and over, or all different: what a tied model at its best
can gain on this machine, without the rest of a model. With one thread, times are the processor's.
"""

from __future__ import annotations

import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper

from benchmarks.harness import Table, in_turns, medians, parse_options
from reroll.export.onnx.emit.artifact import CONTRIB
from reroll.export.onnx.emit.session import Session
from reroll.export.onnx.graph import Graph

PAIRS = 60
SIZES = ((576, 1536), (1536, 576))
BLOCK = 32
DISTINCT = {"fp32": (1, 2, 3, 4, 6, 8, PAIRS), "int8": (1, 2, 4, 6, 8, 10, 16, PAIRS)}
COLUMNS = {
    "precision": "{}",
    "MB read in turn": "{:.1f}",
    "ms for all": "{:.2f}",
    "GB/s": "{:.1f}",
    "times all different": "{:.2f}",
}


def matrix(precision: str, k: int, n: int, random: np.random.Generator) -> list[Any]:
    """The inputs of a product [1, k] to [1, n]: in int8 blocks, their scales and zero points."""
    if precision == "fp32":
        return [random.standard_normal((k, n), dtype=np.float32) * k**-0.5]
    numbers = random.integers(0, 256, (n, k // BLOCK, BLOCK), dtype=np.uint8)
    scales = np.full(n * k // BLOCK, 0.01 * k**-0.5, np.float32)
    return [numbers, scales, np.full(n * k // BLOCK, 128, np.uint8)]


def products(precision: str, distinct: int) -> tuple[onnx.ModelProto, int]:
    """A graph of `PAIRS` pairs of products through so many distinct ones, and their bytes."""
    random = np.random.default_rng(0)
    graph = Graph()
    weights = []
    for number in range(2 * distinct):
        parts = enumerate(matrix(precision, *SIZES[number % 2], random))
        arrays = [numpy_helper.from_array(part, f"w{number}.{i}") for i, part in parts]
        weights.append([graph.stored(a.name, a, torch.float32) for a in arrays])
    x = graph.input("x", torch.float32, (1, SIZES[0][0]))
    for number in range(2 * PAIRS):
        k, n = SIZES[number % 2]
        kind, how = "MatMul", dict[str, Any]()
        if precision == "int8":
            kind, how = "MatMulNBits", {"domain": CONTRIB, "K": k, "N": n, "bits": 8}
            how |= {"block_size": BLOCK, "accuracy_level": 4}
        x = graph.op(kind, x, *weights[number % (2 * distinct)], **how)
    graph.output(x, "y", (1, SIZES[0][0]))
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(CONTRIB, 1)]
    made = helper.make_model(graph.finish("products"), opset_imports=opsets, ir_version=11)
    return made, sum(len(w.raw_data) for w in graph.initializers.values())


def main() -> None:
    """Print a row for each number of distinct pairs."""
    options = parse_options(__doc__, precisions=("fp32", "int8"), rounds=12)
    table = Table(options, COLUMNS)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    x = {"x": np.random.default_rng(1).standard_normal((1, SIZES[0][0]), dtype=np.float32)}
    for case in table.missing({"precision": p} for p in options.precisions):
        sides, sizes = {}, {}
        for distinct in DISTINCT[case["precision"]]:
            model, sizes[distinct] = products(case["precision"], distinct)
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "products.onnx"
                onnx.save(model, path, save_as_external_data=True)
                session = Session(path, options.threads).session
            sides[str(distinct)] = partial(session.run, None, x)
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(options.rounds):
            for name, run in sides.items():
                # the warm run brings back what the other sides put out of the cache
                seconds[name] += in_turns({name: run}, 1, clock=clock)[name]
        took = medians(seconds)
        for distinct, size in sizes.items():
            each = took[str(distinct)]
            speed = size * PAIRS / distinct / each / 1e9
            found = (size / 1e6, 1e3 * each, speed, took[str(PAIRS)] / each)
            table.add(case | dict(zip(list(COLUMNS)[1:], found, strict=True)))


if __name__ == "__main__":
    main()
