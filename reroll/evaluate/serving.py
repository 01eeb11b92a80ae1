"""Measure how fast many requests are answered, with depth-wise batching and without."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from reroll.bounds import COUNT, check_number
from reroll.errors import UsageError
from reroll.evaluate.exits import closed
from reroll.rewrite.ir.exits import exit_loop, is_open
from reroll.runtime.depthwise import DepthScheduler
from reroll.runtime.depthwise.scheduler import Mode

# mode of the scheduler for each side that has exits: see `DepthScheduler`
MODES: Mapping[str, Mode] = {"lockstep": "lockstep", "compaction": "compact", "depth": "depth"}


def answer(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    slots: int,
    tokens: int,
    mode: Mode = "depth",
    while_full: bool = False,
) -> dict[str, Any]:
    """Answer all requests greedily; return seconds of decoding, without prompts, and results.

    `while_full` stops as soon as a slot is empty because no request is left. With one thread,
    seconds are CPU time, which other processes affect less than wall time.
    """
    length = max(map(len, prompts)) + tokens
    with DepthScheduler(model, slots=slots, length=length, mode=mode) as scheduler:
        numbers = [scheduler.submit(prompt, max_new_tokens=tokens) for prompt in prompts]
        wall, cpu = time.perf_counter(), time.process_time()
        scheduler.run(while_full=while_full)
        counts = scheduler.counts
        wall = time.perf_counter() - wall - counts.prompt_seconds
        cpu = time.process_time() - cpu - counts.prompt_cpu_seconds
        return {
            "seconds": cpu if torch.get_num_threads() == 1 else wall,
            "wall_seconds": wall,
            "tokens": [scheduler.tokens(number) for number in numbers],
            "depth": scheduler.depth_report(),
            "batches": counts.batches,
            "rows_per_batch": counts.trips / max(counts.batches, 1),
            "skipped": counts.skipped,
        }


def compare_serving(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    slots: int = 16,
    tokens: int = 32,
    rounds: int = 3,
    while_full: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Measure tokens per second of four ways to answer the same requests; `model` is a lowered one.

    `full` makes all trips. `lockstep` waits for the slowest row of each token. `compaction` drops
    rows that have left. `depth` fills their places in the batch. Each round runs all sides, and the
    result is the median over rounds. With `while_full`, time counts only while all slots are in
    use. Raises UsageError for a model whose thresholds are all infinite, and AssertionError if two
    sides with exits give different tokens.
    """
    for name, count in (("slots", slots), ("tokens", tokens), ("rounds", rounds)):
        check_number(name, count, COUNT, "compare_serving")
    loop_and_exits = exit_loop(model.program)
    if loop_and_exits is None or not any(map(is_open, loop_and_exits[1].thresholds)):
        raise UsageError(
            "nobody leaves this model early",
            hint="give insert_exits a threshold, or run `reroll calibrate`",
        )
    sides: dict[str, tuple[Any, Mode]] = {"full": (closed(model.program).to_module(), "depth")}
    sides |= {name: (model, mode) for name, mode in MODES.items()}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in sides if number % 2 else reversed(sides):
            if progress is not None:
                progress(number * len(sides), rounds * len(sides), name)
            side, mode = sides[name]
            run = answer(
                side, prompts, slots=slots, tokens=tokens, mode=mode, while_full=while_full
            )
            runs[name].append(run)
    outputs = [run["tokens"] for name in MODES for run in runs[name]]
    same = all(_agree(a, b) for each in outputs for a, b in zip(each, outputs[0], strict=True))
    assert same, "the sides do not give the same tokens"
    # the first token of each request comes from its prompt, and has no depth
    speed = {
        name: statistics.median(run["depth"].tokens / run["seconds"] for run in runs[name])
        for name in sides
    }
    return {
        "slots": slots,
        "requests": len(prompts),
        "tokens": tokens,
        "threads": torch.get_num_threads(),
        "trips": loop_and_exits[0].trips,
        "sides": {
            name: {
                "tokens_per_second": speed[name],
                "of_lockstep": speed[name] / speed["lockstep"],
                "seconds": [r["seconds"] for r in runs[name]],
                "wall_seconds": [r["wall_seconds"] for r in runs[name]],
                "batches": runs[name][0]["batches"],
                "rows_per_batch": runs[name][0]["rows_per_batch"],
                "depth": runs[name][0]["depth"].as_data(),
            }
            for name in sides
        },
    }


def _agree(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether two token sequences are equal up to the length of the shorter."""
    return all(x == y for x, y in zip(a, b, strict=False))
