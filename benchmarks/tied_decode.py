"""Decoding one token at a time with fewer distinct layers, at equal depth and in three precisions.

    python -m benchmarks.tied_decode [--model DIR] [--blocks 30,15,10,5,2,1] [--layout cycle]
        [--precisions float32,bfloat16,int8] [--steps 24] [--json FILE]

`float32` and `bfloat16` run the lowered module, `int8` what `reroll export --precision int8` writes
in ONNX Runtime. All sides take each step in turns, behind `--context` tokens, and medians count.
With one thread, times are the processor's. The tied models are not trained: how long a step takes
does not depend on what the weights are.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

import reroll
from benchmarks.harness import MODEL, Table, in_turns, medians, parse_options
from reroll.export.onnx import Onnx
from reroll.export.onnx.emit.session import Session

Step = Callable[[], Any]


def in_torch(program: Any, context: int) -> Step:
    """A step of the lowered module."""
    model = program.to_module()
    cache = DynamicCache(config=model.config)

    def run(ids: torch.Tensor) -> None:
        with torch.inference_mode():
            model(ids, past_key_values=cache)

    run(torch.arange(context)[None] + 5)
    return partial(run, torch.tensor([[7]]))


def in_onnx(program: Any, context: int, threads: int, folder: Path) -> Step:
    """A step of the exported graph, whose weights are integers."""
    Onnx(graphs=("unrolled",), precision="int8").write(program, folder)
    session = Session(folder / "unrolled.onnx", threads)
    session.reset(1)
    length = 0

    def run(ids: torch.Tensor) -> None:
        nonlocal length
        start, length = length, length + ids.shape[1]
        mask = torch.ones(1, length, dtype=torch.long)
        positions = torch.arange(start, length)[None]
        session.run({"input_ids": ids, "attention_mask": mask, "position_ids": positions})

    run(torch.arange(context)[None] + 5)
    return partial(run, torch.tensor([[7]]))


def speeds(options: Any, precision: str) -> dict[str, float]:
    """MB of a layer, and tokens per second by number of layers."""
    dtype = torch.float32 if precision == "int8" else getattr(torch, precision)
    original = reroll.capture(options.model, dtype=dtype)
    (loop,) = original.loops
    elements = sum(w.meta.elements for w in original.weights.values() if w.index is not None)
    width = 1 if precision == "int8" else dtype.itemsize
    with tempfile.TemporaryDirectory() as folder:
        sides: dict[str, Step] = {}
        for count in options.blocks:
            program = original
            if count < loop.trips:
                text = f"tie(blocks={count}, layout={options.layout})"
                program = reroll.run_passes(original, text, measure=False)
            if precision == "int8":
                (directory := Path(folder, str(count))).mkdir()
                step = in_onnx(program, options.context, options.threads, directory)
            else:
                step = in_torch(program, options.context)
            sides[f"{count} layers"] = step
        clock = time.process_time if options.threads == 1 else time.perf_counter
        # a step of its own brings back what the last side put out of the cache
        seconds = medians(in_turns(sides, options.steps, clock=clock, before=True))
    return {"MB of a layer": elements * width / 1e6} | {n: 1 / s for n, s in seconds.items()}


def main() -> None:
    """One row for each precision: tokens per second, then what they are of the first side's."""
    options = parse_options(
        __doc__,
        model=MODEL,
        blocks=(30, 15, 10, 5, 2, 1),
        layout="cycle",
        precisions=("float32", "bfloat16", "int8"),
        context=32,
        steps=24,
    )
    sides = [f"{count} layers" for count in options.blocks]
    columns = {"precision": "{}", "MB of a layer": "{:.1f}"} | dict.fromkeys(sides, "{:.1f}")
    table = Table(options, columns | {f"{side}, ratio": "{:.2f}" for side in sides[1:]})
    for case in table.missing({"precision": precision} for precision in options.precisions):
        row = speeds(options, case["precision"])
        row |= {f"{side}, ratio": row[side] / row[sides[0]] for side in sides[1:]}
        table.add(case | row)


if __name__ == "__main__":
    main()
