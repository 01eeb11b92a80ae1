"""Exits: agreement with the full depth over mean depth, and depth-wise batching."""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import reroll
from benchmarks import pipelines
from benchmarks.harness import TEXT, WIKI, Row, Table, in_turns, medians, text_ids
from reroll.evaluate.exits import calibrate, exit_trips, need_exits, scores_at, with_open
from reroll.evaluate.serving import answer, compare_serving
from reroll.passes.exits.scores import CLASSIFIERS
from reroll.rewrite.ir.exits import exit_loop
from reroll.rewrite.ir.program import Program
from reroll.runtime.depthwise import DepthScheduler
from reroll.runtime.depthwise.row_batch import gather_rows

LEVELS = (0.9, 0.7, 0.5, 0.3, 0.1)


def measure(table: Table, options: Namespace) -> None:
    """Add a row for each criterion, and draw all of them."""
    pipelines.measure(table, options)
    if options.plot:
        before = json.loads(Path(options.before).read_text())["rows"] if options.before else []
        earlier = [row | {"pipeline": f"{row['pipeline']}, before"} for row in before]
        plot([*earlier, *table.rows], options.plot)


def agreement(program: Program, original: Program, options: Namespace) -> Row:
    """Agreement and mean depth at each quantile of the scores on other text."""
    found: Row = {}
    if exit_loop(program) is None:
        for level in LEVELS:
            found[f"agreement at {level}"] = 1.0
            found[f"depth at {level}"] = float(program.loops[0].trips)
        return found
    train = text_ids(options.model, TEXT / "wiki.train.txt", options.fit)
    if any(f"criterion={name}" in program.origin.steps[-1].text for name in CLASSIFIERS):
        full = program.to_module()
        fitted = reroll.fit_exits(full, train, steps=150)
        found["right when fitted"] = ", ".join(f"{share:.0%}" for share in fitted.values())
        program = full.to_program()
    tokens = torch.cat([train[:256], text_ids(options.model, WIKI, options.tokens)])
    # no level is left out, whatever its risk
    never = 1 - 1e-9
    _, made = calibrate(program, tokens, levels=LEVELS, risk=never, confidence=1 - never)
    for each in made.tried:
        found[f"agreement at {each['level']}"] = 1 - each["observed"]
        found[f"depth at {each['level']}"] = each["depth"]
    return found


def plot(rows: list[Row], file: str) -> None:
    """Draw a line for each criterion."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="tight")
    axes = figure.add_subplot()
    axes.set(xlabel="mean depth", ylabel="agreement with the full depth")
    axes.grid(alpha=0.3)
    for row in rows:
        names = [level for level in LEVELS if f"depth at {level}" in row]
        lines = [[row[f"{of} at {level}"] for level in names] for of in ("depth", "agreement")]
        style = "--" if row["pipeline"].endswith("before") else "-"
        axes.plot(*lines, marker="o", linestyle=style, label=row["pipeline"])
    axes.legend()
    figure.savefig(file, dpi=120)


# ---- depth-wise batching


def serve(table: Table, options: Namespace) -> None:
    """Add a row for each number of requests and each side, or for the parts of a tick."""
    original = reroll.capture(options.model, dtype=getattr(torch, options.dtype))
    ids = text_ids(options.model, WIKI, 10_000).tolist()
    starts = range(0, 60 * max(options.requests) * options.queue, 60)
    prompts = [ids[start : start + options.prompt] for start in starts]
    for name, passes in pipelines.expanded(options):
        missing = list(table.missing({"pipeline": name, "requests": n} for n in options.requests))
        if not missing:
            continue
        program = reroll.run_passes(original, passes, measure=False)
        if options.parts:
            first = exit_trips(program, need_exits(program)[1])[0]
            model = with_open(program, {first: 0.5}).to_module()
        else:
            model = opened(program, prompts[:24], options).to_module()
        rows_of = parts if options.parts else served
        for case in missing:
            for row in rows_of(model, prompts, case["requests"], options):
                table.add(case | row)


def opened(program: Program, prompts: list[list[int]], options: Namespace) -> Program:
    """The program with thresholds at quantiles of the scores of what it generates at full depth."""
    loop, exits = need_exits(program)
    run = answer(program.to_module(), prompts, slots=16, tokens=options.tokens)
    rows = [torch.tensor(p + t[:-1]) for p, t in zip(prompts, run["tokens"], strict=True)]
    found = scores_at(program, exits, exit_trips(program, exits), rows)
    scores = {t: s.view(len(rows), -1)[:, 1 - options.tokens :] for t, s in found.items()}
    for level in [float(options.level)] if options.level else options.levels:
        tried = with_open(program, {t: s.quantile(level).item() for t, s in scores.items()})
        depth = answer(tried.to_module(), prompts, slots=16, tokens=options.tokens)["depth"]
        print(f"quantile {level}: {depth}", file=sys.stderr, flush=True)
        if depth.mean <= 0.6 * loop.trips:
            break
    return tried


def served(model: Any, prompts: list[list[int]], count: int, options: Namespace) -> list[Row]:
    """What each side does with the requests, with so many slots."""
    found = compare_serving(
        model, prompts[: count * options.queue], slots=count, tokens=options.tokens,
        rounds=options.rounds, while_full=options.full,
    )  # fmt: skip
    return [
        {"side": name, "depth": side.pop("depth")["mean"], **side}
        for name, side in found["sides"].items()
    ]


def parts(model: Any, prompts: list[list[int]], count: int, options: Namespace) -> list[Row]:
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
        "one trip": lambda: engine.run_step(at(0)),
        "all trips not made": lambda: engine.run_skips(at(engine.trips // 2)),
        "head": lambda: engine.logits(now),
        "start of a token": lambda: engine.start(slots, [5] * len(slots)),
    }
    found: Row = {}
    with torch.no_grad():
        gather_rows(now)
        for name, call in calls.items():
            seconds = medians(in_turns({name: call}, 15, clock=time.process_time, warm=0))
            found[f"{name}, ms"] = 1000 * seconds[name]
    return [found]
