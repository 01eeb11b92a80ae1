"""Continuous depth-wise batching beside lockstep and compaction, on a tied model with exits.

    python -m benchmarks.depthwise [--model DIR] [--blocks 15,10] [--requests 1,4,16]
        [--queue 2] [--tokens 24] [--rounds 3] [--threads 1] [--parts] [--json FILE]

All four sides run the same generated functions over the same caches: `full` never leaves the loop,
`lockstep` waits for its slowest row, `compact` drops rows that are done, `depth` fills their places
with tokens at other depths. Exits stand between the rounds through the blocks, by `saturation`;
thresholds are set so that the mean depth is at most `--depth` of the trips on the prompts that are
timed. The model is tied and not trained, so what it says is of no use, and when it leaves is a
matter of its hidden states. Rounds take the sides in turns, medians
are reported, and the tokens of all sides with exits have to be the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import reroll
from reroll.rewrite.rolling.exits import exit_loop, with_thresholds
from reroll.runtime.depthwise import DepthScheduler

SEARCH = 6
SIDES = ("full", "lockstep", "compact", "depth")


def timed(
    model: Any, mode: str, prompts: list[list[int]], tokens: int, slots: int
) -> dict[str, Any]:
    """Seconds of decoding, without the prompts, and what came of it.

    With one thread they are seconds of the processor's time, so that what else the machine does
    counts less.
    """
    with DepthScheduler(model, slots=slots, length=128, mode=mode) as scheduler:
        admit, spent = scheduler._admit, [0.0, 0.0]

        def timed_admit() -> None:
            start, cpu = time.perf_counter(), time.process_time()
            admit()
            spent[0] += time.perf_counter() - start
            spent[1] += time.process_time() - cpu

        scheduler._admit = timed_admit  # type: ignore[method-assign]
        numbers = [scheduler.submit(p, max_new_tokens=tokens) for p in prompts]
        start, cpu = time.perf_counter(), time.process_time()
        scheduler.run()
        wall = time.perf_counter() - start - spent[0]
        cpu = time.process_time() - cpu - spent[1]
        return {
            "wall": wall,
            "seconds": cpu if torch.get_num_threads() == 1 else wall,
            "tokens": [list(scheduler.stream(n)) for n in numbers],
            "depth": scheduler.depth_report(),
            "counts": vars(scheduler.counts),
        }


def parts(model: Any, prompts: list[list[int]], counts: tuple[int, ...]) -> None:
    """Print the processor's time of each part of a tick, in milliseconds, by the number of rows."""
    scheduler = DepthScheduler(model, slots=len(prompts), length=128)
    for prompt in prompts:
        scheduler.submit(prompt, max_new_tokens=8)
    scheduler.tick()
    engine = scheduler.engine
    print("| rows | one trip | trips not made, each | head | start of a token |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    with torch.no_grad():
        for count in counts:
            rows = [replace(r, trip=0) for r in scheduler._rows[:count]]
            half = [replace(r, trip=engine.trips // 2) for r in rows]
            calls: dict[str, Callable[[], Any]] = {
                "trip": lambda rows=rows: engine.run_step([replace(r) for r in rows]),
                "skips": lambda half=half: engine.run_skips(half),
                "head": lambda rows=rows: engine.logits(rows),
                "start": lambda rows=rows: engine.start([r.slot for r in rows], [5] * len(rows)),
            }
            took = {}
            for name, call in calls.items():
                times = []
                for _ in range(7):
                    start = time.process_time()
                    call()
                    times.append(1000 * (time.process_time() - start))
                took[name] = statistics.median(times)
            took["skips"] /= engine.trips - engine.trips // 2
            cells = " | ".join(f"{value:.2f}" for value in took.values())
            print(f"| {len(rows)} | {cells} |", flush=True)


def with_depth(
    program: Any,
    prompts: list[list[int]],
    tokens: int,
    slots: int,
    wanted: float,
    given: float | None,
) -> Any:
    """The program with one threshold for all exits, so that tokens make `wanted` of the trips."""
    loop, exits = exit_loop(program)
    low, high, best = -4.0, 0.0, None
    for _ in range(SEARCH if given is None else 1):
        # scores are cosines, near one
        middle = 1 - 10 ** ((low + high) / 2) if given is None else given
        edited = program.edit()
        own, _ = exit_loop(edited)
        at = {t: middle for t, old in enumerate(exits.thresholds) if old < float("inf")}
        tried = with_thresholds(edited, own, at)
        report = timed(tried.to_module(), "depth", prompts, tokens, slots)["depth"]
        if report.mean <= wanted * loop.trips:
            high, best = (low + high) / 2, (tried, middle, report)
        else:
            low = (low + high) / 2
    assert best is not None
    return best


def main() -> None:
    """Print the table, row by row."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--text", type=Path, default=Path("data/text/wiki.val.txt"))
    parser.add_argument("--blocks", default="15,10")
    parser.add_argument("--relax", default="")
    parser.add_argument("--requests", default="1,4,16")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--depth", type=float, default=0.6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--queue", type=int, default=2, help="requests for each slot")
    parser.add_argument("--threshold", type=float, help="instead of a search")
    parser.add_argument("--parts", action="store_true", help="time the parts of a tick instead")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    original = reroll.capture(options.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    text = options.text.read_text(encoding="utf-8")[:40_000]
    ids = tokenizer.encode(text, add_special_tokens=False)
    rows = []
    print("| blocks | requests | mean depth | side | tokens/s | of lockstep | rows per batch |")
    print("| ---: | ---: | ---: | --- | ---: | ---: | ---: |")
    for blocks in map(int, options.blocks.split(",")):
        at = list(range(blocks, original.loops[0].trips, blocks))
        passes = f"tie(blocks={blocks}), {options.relax}" if options.relax else f"tie({blocks=})"
        passes += f", insert_exits(at={at}, criterion=saturation, threshold=0.5)"
        program = reroll.run_passes(original, passes, measure=False)
        if options.parts:
            found = [int(n) for n in options.requests.split(",")]
            prompts = [ids[100 * i : 100 * i + 12] for i in range(max(found))]
            parts(program.to_module(), prompts, tuple(found))
            continue
        for count in map(int, options.requests.split(",")):
            prompts = [ids[100 * i : 100 * i + 12] for i in range(count * options.queue)]
            found = with_depth(
                program, prompts, options.tokens, count, options.depth, options.threshold
            )
            chosen, threshold, report = found
            model = chosen.to_module()
            closed = with_thresholds(
                edited := program.edit(),
                exit_loop(edited)[0],
                dict.fromkeys(range(original.loops[0].trips), float("inf")),
            ).to_module()
            results: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
            for number in range(options.rounds):
                for side in SIDES if number % 2 else SIDES[::-1]:
                    mode = "lockstep" if side == "full" else side
                    own = closed if side == "full" else model
                    results[side].append(timed(own, mode, prompts, options.tokens, count))
            same = all(
                r["tokens"] == results["depth"][0]["tokens"]
                for side in SIDES[1:]
                for r in results[side]
            )
            assert same, "the sides do not give the same tokens"
            made = len(prompts) * (options.tokens - 1)
            speed = {
                side: made / statistics.median(r["seconds"] for r in results[side])
                for side in SIDES
            }
            for side in SIDES:
                counts = results[side][0]["counts"]
                fullness = counts["trips"] / counts["batches"]
                depth = results[side][0]["depth"].mean
                print(
                    f"| {blocks} | {count} | {depth:.1f} | {side} | {speed[side]:.1f} "
                    f"| {speed[side] / speed['lockstep']:.2f} | {fullness:.1f} |",
                    flush=True,
                )
                rows.append(
                    {
                        "blocks": blocks, "requests": count, "depth": depth, "side": side,
                        "speed": speed[side], "threshold": threshold, "counts": counts,
                        "seconds": [r["seconds"] for r in results[side]],
                        "wall": [r["wall"] for r in results[side]],
                        "histogram": report.histogram,
                    }
                )  # fmt: skip
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
