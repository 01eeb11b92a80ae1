"""Continuous depth-wise batching beside lockstep and compaction, on a tied model with exits.

    python -m benchmarks.depthwise [--model DIR] [--blocks 15,10] [--at 10] [--requests 1,4,16]
        [--criterion saturation] [--states propagate,skip] [--depth 0.6 | --level Q] [--queue 2]
        [--tokens 24] [--full] [--rounds 3] [--threads 1] [--dtype float32] [--parts] [--json FILE]

All four sides run the same functions over the same caches: `full` never leaves the loop, `lockstep`
waits for its slowest row, `compaction` drops rows that are done, `depth` fills their places with
tokens at other depths. Exits stand after the first round through the blocks and all further ones,
or where `--at` says. Thresholds are one quantile of the scores, at each exit, of tokens that are
generated at full depth: the first for which tokens make at most `--depth` of the trips on some of
the prompts. The model is tied and not trained, so what it says is of no use, and when it leaves is
a matter of its hidden states. The tokens of all sides with exits have to be the same. `--full`
counts the time in which no slot is free for want of requests, as a server that is busy has it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import reroll
from reroll.evaluate.exits import scores_at, with_open
from reroll.evaluate.serving import answer, compare_serving
from reroll.rewrite.ir.exits import exit_loop
from reroll.runtime.depthwise import DepthScheduler
from reroll.runtime.depthwise.engine import Engine
from reroll.runtime.depthwise.row_batch import Row, gather_rows

LEVELS = (0.4, 0.3, 0.2, 0.1, 0.05)
TRIPS, SKIPS, HEAD, START = "one trip", "all trips not made", "head", "start of a token"


def parts(model: Any, prompts: list[list[int]], counts: list[int]) -> dict[int, dict[str, float]]:
    """The processor's time of each part of a tick, in milliseconds, by the number of rows."""
    found: dict[int, dict[str, float]] = {}
    for count in counts:
        scheduler = DepthScheduler(model, slots=count, length=64)
        for prompt in prompts[:count]:
            scheduler.submit(prompt, max_new_tokens=8)
        scheduler.tick()
        now = scheduler._rows
        calls = _calls(scheduler.engine, now)
        with torch.no_grad():
            gather_rows(now)
            found[count] = {}
            for name, call in calls.items():
                times = []
                for _ in range(15):
                    start = time.process_time()
                    call()
                    times.append(1000 * (time.process_time() - start))
                found[count][name] = statistics.median(times)
    return found


def _calls(engine: Engine, now: list[Row]) -> dict[str, Callable[[], Any]]:
    """What a tick does with these rows, by name."""
    half = engine.trips // 2
    slots = [row.slot for row in now]

    def at(trip: int) -> list[Row]:
        for row in now:
            row.trip, row.left = trip, False
        return now

    return {
        TRIPS: lambda: engine.run_step(at(0)),
        SKIPS: lambda: engine.run_skips(at(half)),
        HEAD: lambda: engine.logits(now),
        START: lambda: engine.start(slots, [5] * len(slots)),
    }


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
        if options.level is not None:
            break
        depth = answer(tried.to_module(), prompts, slots=16, tokens=options.tokens)["depth"]
        print(f"quantile {level}: {depth}", file=sys.stderr, flush=True)
        if depth.mean <= options.depth * loop.trips:
            break
    return tried


def main() -> None:
    """Print the table, row by row."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--text", type=Path, default=Path("data/text/wiki.val.txt"))
    parser.add_argument("--blocks", default="15,10")
    parser.add_argument("--at", help="trips after which tokens may leave")
    parser.add_argument("--requests", default="1,4,16")
    parser.add_argument("--criterion", default="saturation")
    parser.add_argument("--states", default="propagate,skip")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--depth", type=float, default=0.6)
    parser.add_argument("--level", type=float, help="the quantile, instead of a search for it")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--queue", type=int, default=2, help="requests for each slot")
    parser.add_argument("--full", action="store_true", help="count only while no slot is free")
    parser.add_argument("--prompt", type=int, default=12, help="tokens of a prompt")
    parser.add_argument("--parts", action="store_true", help="time the parts of a tick instead")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    original = reroll.capture(options.model, dtype=getattr(torch, options.dtype))
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    text = options.text.read_text(encoding="utf-8")[:60_000]
    ids = tokenizer.encode(text, add_special_tokens=False)
    counts = [int(n) for n in options.requests.split(",")]
    rows: list[Any] = []
    if options.parts:
        print(f"| blocks | state | rows | {TRIPS} | {SKIPS} | {HEAD} | {START} |")
        print("| ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    else:
        print("| blocks, exits | state | requests | side | depth | tokens/s | of lockstep | rows |")
        print("| --- | --- | ---: | --- | ---: | ---: | ---: | ---: |")
    trips = original.loops[0].trips
    for blocks in map(int, options.blocks.split(",")):
        at = list(range(blocks, trips, blocks))
        if options.at:
            at = [int(n) for n in options.at.split(",")]
        for state in options.states.split(","):
            exits = f"insert_exits(at={at}, criterion={options.criterion}, state={state})"
            program = reroll.run_passes(original, f"tie(blocks={blocks}), {exits}", measure=False)
            if options.parts:
                prompts = [ids[100 * i : 100 * i + 12] for i in range(max(counts))]
                program = with_open(program, {at[0] - 1: 0.5})
                for count, took in parts(program.to_module(), prompts, counts).items():
                    cells = " | ".join(f"{value:.2f}" for value in took.values())
                    print(f"| {blocks} | {state} | {count} | {cells} |", flush=True)
                continue
            prompts = [
                ids[60 * i : 60 * i + options.prompt] for i in range(max(counts) * options.queue)
            ]
            chosen = opened(program, at, prompts[:24], options)
            model = chosen.to_module()
            for count in counts:
                found = compare_serving(
                    model,
                    prompts[: count * options.queue],
                    slots=count,
                    tokens=options.tokens,
                    rounds=options.rounds,
                    while_full=options.full,
                )
                for name, side in found["sides"].items():
                    print(
                        f"| {blocks}, {at} | {state} | {count} | {name} "
                        f"| {side['depth']['mean']:.1f} | {side['tokens_per_second']:.1f} "
                        f"| {side['of_lockstep']:.2f} | {side['rows_per_batch']:.1f} |",
                        flush=True,
                    )
                rows.append({"blocks": blocks, "at": at, "state": state, **found})
                if options.json:
                    options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
