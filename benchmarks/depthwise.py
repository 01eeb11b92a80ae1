"""Continuous depth-wise batching beside lockstep and compaction, on a tied model with exits.

    python -m benchmarks.depthwise [--model DIR] [--blocks 15,10] [--at 10] [--requests 1,4,16]
        [--states propagate,skip] [--level Q] [--queue 2] [--prompt 12] [--tokens 24] [--full]
        [--rounds 3] [--dtype float32] [--parts] [--json FILE]

All four sides run the same functions over the same caches: `full` never leaves the loop, `lockstep`
waits for its slowest row, `compaction` drops rows that are done, `depth` fills their places with
tokens at other depths. All sides with exits have to give the same tokens. Exits stand after each
round through the blocks, or where `--at` says. Thresholds are one quantile of the scores, at each
exit, of tokens that are generated at full depth: `--level`, or the first for which tokens make at
most 60 % of the trips. The model is tied and not trained. `--full` counts the time in which no slot
is free for want of requests, as a server that is busy has it. `--parts` times what a tick consists
of instead, in milliseconds of the processor's time.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from itertools import product
from typing import Any

import torch

import reroll
from benchmarks.harness import MODEL, WIKI, Row, Table, in_turns, medians, parse_options, text_ids
from reroll.evaluate.exits import scores_at, with_open
from reroll.evaluate.serving import answer, compare_serving
from reroll.rewrite.ir.exits import exit_loop
from reroll.runtime.depthwise import DepthScheduler
from reroll.runtime.depthwise.row_batch import gather_rows

LEVELS = (0.4, 0.3, 0.2, 0.1, 0.05)
CASE = {"blocks, exits": "{}", "state": "{}", "requests": "{:}"}
SIDES = {
    "side": "{}", "depth": "{:.1f}", "tokens/s": "{:.1f}", "of lockstep": "{:.2f}",
    "rows per batch": "{:.1f}",
}  # fmt: skip
TRIP, SKIPS, HEAD, START = "one trip", "all trips not made", "head", "start of a token"
PARTS = dict.fromkeys((TRIP, SKIPS, HEAD, START), "{:.2f}")


def parts(model: Any, prompts: list[list[int]], count: int, options: Any) -> list[Row]:
    """The processor's time of each part of a tick with so many rows, in milliseconds."""
    scheduler = DepthScheduler(model, slots=count, length=64)
    for prompt in prompts[:count]:
        scheduler.submit(prompt, max_new_tokens=8)
    scheduler.tick()
    engine, now = scheduler.engine, scheduler._rows
    slots = [row.slot for row in now]

    def at(trip: int) -> Any:
        for row in now:
            row.trip, row.left = trip, False
        return now

    calls: dict[str, Callable[[], Any]] = {
        TRIP: lambda: engine.run_step(at(0)),
        SKIPS: lambda: engine.run_skips(at(engine.trips // 2)),
        HEAD: lambda: engine.logits(now),
        START: lambda: engine.start(slots, [5] * len(slots)),
    }
    found: Row = {}
    with torch.no_grad():
        gather_rows(now)
        for name, call in calls.items():
            found |= medians(in_turns({name: call}, 15, clock=time.process_time, warm=0))
    return [{name: 1000 * seconds for name, seconds in found.items()}]


def opened(program: Any, at: list[int], prompts: list[list[int]], options: Any) -> Any:
    """The program with thresholds at quantiles of the scores of what it generates at full depth."""
    inserted = exit_loop(program)
    assert inserted is not None
    loop, exits = inserted
    run = answer(program.to_module(), prompts, slots=16, tokens=options.tokens)
    rows = [torch.tensor(p + t[:-1]) for p, t in zip(prompts, run["tokens"], strict=True)]
    new = options.tokens - 1
    found = scores_at(program, exits, [stop - 1 for stop in at], rows)
    scores = {t: s.view(len(rows), -1)[:, -new:].flatten() for t, s in found.items()}
    for level in LEVELS if options.level is None else [options.level]:
        tried = with_open(program, {t: s.quantile(level).item() for t, s in scores.items()})
        depth = answer(tried.to_module(), prompts, slots=16, tokens=options.tokens)["depth"]
        print(f"quantile {level}: {depth}", file=sys.stderr, flush=True)
        if depth.mean <= 0.6 * loop.trips:
            break
    return tried


def served(model: Any, prompts: list[list[int]], count: int, options: Any) -> list[Row]:
    """What each side does with the requests, with so many slots."""
    found = compare_serving(
        model, prompts[: count * options.queue], slots=count, tokens=options.tokens,
        rounds=options.rounds, while_full=options.full,
    )  # fmt: skip
    return [
        {
            "side": name, "depth": side["depth"]["mean"], "tokens/s": side["tokens_per_second"],
            "of lockstep": side["of_lockstep"], "rows per batch": side["rows_per_batch"],
            "measured": side,
        }
        for name, side in found["sides"].items()
    ]  # fmt: skip


def main() -> None:
    """Add a row for each number of requests, and with `--parts` not for each side."""
    options = parse_options(
        __doc__, model=MODEL, blocks=(15, 10), at=str, requests=(1, 4, 16),
        states=("propagate", "skip"), level=float, queue=2, prompt=12, tokens=24, full=False,
        rounds=3, dtype="float32", parts=False,
    )  # fmt: skip
    table = Table(options, CASE | (PARTS if options.parts else SIDES))
    original = reroll.capture(options.model, dtype=getattr(torch, options.dtype))
    ids = text_ids(options.model, WIKI, 10_000).tolist()
    starts = range(0, 60 * max(options.requests) * options.queue, 60)
    prompts = [ids[start : start + options.prompt] for start in starts]
    trips = original.loops[0].trips
    for blocks, state in product(options.blocks, options.states):
        at = [int(n) for n in (options.at or "").split(",") if n]
        at = at or list(range(blocks, trips, blocks))
        case = {"blocks, exits": f"{blocks}, {at}", "state": state}
        missing = list(table.missing(case | {"requests": n} for n in options.requests))
        if not missing:
            continue
        passes = f"tie(blocks={blocks}), insert_exits(at={at}, criterion=saturation, state={state})"
        program = reroll.run_passes(original, passes, measure=False)
        if options.parts:
            program = with_open(program, {at[0] - 1: 0.5})
        else:
            program = opened(program, at, prompts[:24], options)
        model, measure = program.to_module(), parts if options.parts else served
        for each in missing:
            for row in measure(model, prompts, each["requests"], options):
                table.add(each | row)


if __name__ == "__main__":
    main()
