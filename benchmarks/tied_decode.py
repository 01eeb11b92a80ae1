"""Decoding one token at a time with fewer distinct layers, at equal depth and in three precisions.

    python -m benchmarks.tied_decode [--model DIR] [--blocks 30,15,10,5,2,1] [--layout cycle]
        [--precisions float32,bfloat16,int8] [--steps 24] [--threads 1] [--json FILE]

`float32` and `bfloat16` run the lowered module, `int8` runs what `reroll export --precision int8`
writes in ONNX Runtime. Every step is taken by all sides in turns, behind `--context` tokens, and
medians count. With one thread, times are the processor's. The tied models are not trained: how long
a step takes does not depend on what the weights are.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

import reroll
from reroll.export.onnx import Onnx
from reroll.export.onnx.emit.session import Session
from reroll.rewrite.analysis.cache_fit import last_level_cache

Step = Callable[[], Any]


def in_torch(program: Any, context: int) -> Step:
    """A step of the lowered module."""
    model = program.to_module()
    cache = DynamicCache(config=model.config)
    ids = torch.arange(context)[None] + 5
    with torch.inference_mode():
        model(ids, past_key_values=cache)

    def step() -> None:
        with torch.inference_mode():
            model(torch.tensor([[7]]), past_key_values=cache)

    return step


def in_onnx(program: Any, context: int, threads: int, folder: Path) -> Step:
    """A step of the exported graph, whose weights are integers."""
    Onnx(graphs=("unrolled",), precision="int8").write(program, folder)
    session = Session(folder / "unrolled.onnx", threads)
    session.reset(1)
    length = 0

    def run(ids: torch.Tensor) -> None:
        nonlocal length
        start, length = length, length + ids.shape[1]
        session.run(
            {
                "input_ids": ids,
                "attention_mask": torch.ones(1, length, dtype=torch.long),
                "position_ids": torch.arange(start, length)[None],
            }
        )

    run(torch.arange(context)[None] + 5)
    return lambda: run(torch.tensor([[7]]))


def main() -> None:
    """Print one row for each precision."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--blocks", default="30,15,10,5,2,1")
    parser.add_argument("--layout", default="cycle")
    parser.add_argument("--precisions", default="float32,bfloat16,int8")
    parser.add_argument("--context", type=int, default=32)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    blocks = [int(n) for n in options.blocks.split(",")]
    print(f"last-level cache: {last_level_cache()} bytes")
    print("| precision | MB of a layer | " + " | ".join(f"{n} layers" for n in blocks) + " |")
    print("| --- | ---: |" + " ---: |" * len(blocks))
    results = []
    for precision in options.precisions.split(","):
        dtype = torch.float32 if precision == "int8" else getattr(torch, precision)
        original = reroll.capture(options.model, dtype=dtype)
        (loop,) = original.loops
        stacked = [w for w in original.weights.values() if w.index is not None]
        width = 1 if precision == "int8" else dtype.itemsize
        layer = sum(w.meta.elements for w in stacked) * width / 1e6
        with tempfile.TemporaryDirectory() as folder:
            steps: dict[int, Step] = {}
            for count in blocks:
                text = f"tie(blocks={count}, layout={options.layout})"
                program = original
                if count < loop.trips:
                    program = reroll.run_passes(original, text, measure=False)
                if precision == "int8":
                    place = Path(folder) / str(count)
                    place.mkdir()
                    steps[count] = in_onnx(program, options.context, options.threads, place)
                else:
                    steps[count] = in_torch(program, options.context)
            times: dict[int, list[float]] = {count: [] for count in blocks}
            for _ in range(options.steps):
                for count, step in steps.items():
                    # a step of its own brings back what the last side put out of the cache
                    step()
                    start = clock()
                    step()
                    times[count].append(clock() - start)
        speed = {count: 1 / statistics.median(seconds) for count, seconds in times.items()}
        cells = " | ".join(f"{s:.1f} ({s / speed[blocks[0]]:.2f})" for s in speed.values())
        print(f"| {precision} | {layer:.1f} | {cells} |", flush=True)
        results.append({"precision": precision, "layer_mb": layer, "speed": speed, "times": times})
        if options.json:
            options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
