"""How many model types capture, exactly, and how much of each rolls into loops.

Every model is tiny and random (see `tiny_models`) and is measured in a process of its own with a
time limit, so one that crashes or hangs costs only its own row. A Program is run here by the
reference of each op, not by the lowered module: what is compared with the original is the graph.

    python -m benchmarks.coverage --kind causal
    python -m benchmarks.coverage --types llama,gemma3_text --json rows.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import multiprocessing
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks import tiny_models
from reroll.rewrite.capture import capture
from reroll.rewrite.passes.interpret import complete, run
from reroll.rewrite.program import Program
from reroll.rewrite.raising import raise_idioms
from reroll.rewrite.rolling import roll_loops

# relative to the largest logit: what reordering a sum changes in fp32
TOLERANCE = 1e-5
# not the sizes that a model is captured with, so a size that was baked in shows
BATCH, LENGTH = 2, 24


@dataclass
class Row:
    """What happened to one model type; a field is None where the step before it failed.

    `error` and `rolled_error` are the largest differences from the original's outputs, `scale` the
    largest output. `loops` lists each loop as trips x layers per trip, `rolled` adds them up.
    `attentions` counts the attention calls of the flat graph that are one node.
    """

    type: str
    kind: tiny_models.Kind
    layers: int | None = None
    mixing: str | None = None
    nodes: int | None = None
    attentions: int | None = None
    error: float | None = None
    scale: float | None = None
    loops: str | None = None
    rolled: int | None = None
    rolled_error: float | None = None
    seconds: float = 0.0
    failed: str | None = None
    reason: str | None = None

    @property
    def exact(self) -> bool:
        """Whether the flat program computes the original's outputs bit for bit."""
        return self.error == 0.0

    @property
    def close(self) -> bool:
        """Whether the flat program computes the original's outputs up to rounding."""
        return self.error is not None and self.error <= TOLERANCE * max(self.scale or 0.0, 1.0)


def measure(row: Row, report: Callable[[Row], None]) -> None:
    """Fill `row` step by step and report after each, so that a crash keeps what was found."""
    found: dict[str, Any] = {}
    steps: dict[str, Callable[[Row, dict[str, Any]], None]]
    steps = {"build": _build, "flat": _flat, "roll": _roll}
    for name, step in steps.items():
        row.failed = name
        report(row)
        try:
            step(row, found)
        except Exception as error:  # the table is the report of what fails
            first = str(error).strip().split("\n")[0]
            row.reason = f"{type(error).__name__}: {first[:200]}"
            report(row)
            return
    row.failed = None
    report(row)


def _build(row: Row, found: dict[str, Any]) -> None:
    model = tiny_models.build(row.type, kind=row.kind)
    inputs = tiny_models.example_inputs(model, BATCH, LENGTH)
    row.layers, row.mixing = tiny_models.layer_count(model), tiny_models.token_mixing(model)
    found.update(model=model, inputs=inputs)
    tiny_models.run_eager(model, inputs)


def _flat(row: Row, found: dict[str, Any]) -> None:
    program = found["flat"] = capture(found["model"], roll=False)
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    row.nodes = len(calls)
    row.attentions = sum("reroll.attention" in str(node.target) for node in calls)
    row.error, row.scale = _difference(program, found)


def _roll(row: Row, found: dict[str, Any]) -> None:
    program = roll_loops(raise_idioms(found["flat"]))
    row.loops = " ".join(f"{each.trips}x{each.period}" for each in program.loops) or "none"
    row.rolled = sum(each.layers for each in program.loops)
    row.rolled_error, _ = _difference(program, found)


def _difference(program: Program, found: Mapping[str, Any]) -> tuple[float, float]:
    """Largest difference from the original's outputs, and the largest output, where not padded."""
    names = {each.name for each in program.inputs}
    given = {name: tensor for name, tensor in found["inputs"].items() if name in names}
    inputs = complete(program, given)
    actual = tiny_models.primary_output(SimpleNamespace(**run(program, inputs)))
    actual = tiny_models.valid_outputs(actual, inputs)
    expected = tiny_models.valid_outputs(tiny_models.run_eager(found["model"], inputs), inputs)
    if actual.shape != expected.shape:
        raise ValueError(f"outputs are {list(actual.shape)}, not {list(expected.shape)}")
    return float((actual - expected).abs().max()), float(expected.abs().max())


def _child(row: Row, sender: Connection) -> None:
    """Measure in a process of its own and send the row after each step."""
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    measure(row, sender.send)
    sender.close()


def measured(row: Row, limit: float) -> Row:
    """`row` filled by a process that is stopped after `limit` seconds."""
    started = time.perf_counter()
    # a fork has everything imported already
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(row, sender))
    process.start()
    sender.close()
    try:
        while receiver.poll(max(0.0, started + limit - time.perf_counter())):
            row = receiver.recv()
        row.reason = f"TimeLimit: stopped after {limit:.0f} s"
        process.kill()
    except EOFError:  # the process is done, or dead
        process.join()
        if row.failed and not row.reason:
            row.reason = f"Crash: exit status {process.exitcode}"
    process.join()
    row.seconds = time.perf_counter() - started
    return row


def line(row: Row) -> str:
    """One row as text."""
    error = "-" if row.error is None else "0" if row.exact else f"{row.error:.1e}"
    rolled = "-" if row.rolled is None else f"{row.rolled}/{row.layers}"
    rolled_error = "-" if row.rolled_error is None else f"{row.rolled_error:.1e}"
    reason = f"{row.failed}: {row.reason}" if row.failed else ""
    columns = [
        f"{row.type:28s} {row.layers or '-':>3} {row.mixing or '-':9s} {row.nodes or '-':>5}",
        f"{'-' if row.attentions is None else row.attentions:>4} {error:>8s}",
        f"{rolled:>6s} {row.loops or '-':12s} {rolled_error:>8s} {row.seconds:5.1f}s {reason}",
    ]
    return " ".join(columns).rstrip()


HEADER = (
    f"{'type':28s} {'lay':>3s} {'mixing':9s} {'nodes':>5s} {'attn':>4s} {'error':>8s} "
    f"{'rolled':>6s} {'loops':12s} {'error':>8s} {'time':>6s} reason"
)


def totals(rows: Sequence[Row]) -> str:
    """How far all rows got, as text."""
    whole = [row for row in rows if row.rolled and row.layers and row.rolled >= row.layers]
    counts = {
        "types": len(rows),
        "built": sum(row.failed != "build" for row in rows),
        "captured": sum(row.nodes is not None for row in rows),
        "attention as one op": sum(bool(row.attentions) for row in rows),
        "bit-identical": sum(row.exact for row in rows),
        f"within {TOLERANCE:.0e}": sum(row.close for row in rows),
        "rolled": sum(bool(row.rolled) for row in rows),
        "rolled whole": len(whole),
    }
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def main() -> None:
    """Print the table, and the totals over all rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--types", help="comma-separated model types; all of the kind by default")
    parser.add_argument("--kind", choices=["causal", "encoder", "all"], default="all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds per model type")
    arguments = parser.parse_args()
    chosen = arguments.types.split(",") if arguments.types else None
    known: dict[tiny_models.Kind, list[str]]
    known = {"causal": tiny_models.causal_types(), "encoder": tiny_models.encoder_types()}
    wanted = [
        Row(each, kind)
        for kind, types in known.items()
        for each in types
        if arguments.kind in (kind, "all") and (chosen is None or each in chosen)
    ]
    rows = []
    print(HEADER)
    for row in wanted:
        rows.append(measured(row, arguments.limit))
        print(line(rows[-1]), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps([dataclasses.asdict(r) for r in rows], indent=1))
    print(totals(rows))


if __name__ == "__main__":
    main()
