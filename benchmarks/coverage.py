"""Which model types convert exactly, by every door and called in every way.

Every model is tiny and random (see `tests.tiny.types`). A row is a type and a door: the model as an
object, a directory that transformers saved, or that directory in bf16. It holds a cell for each
call and measure (see `calls`), in the process that captured and, from the saved model, in a fresh
one, and for each ONNX graph that was exported and run. A row is measured in a process of its own
with a time limit, so one that crashes or hangs costs only itself. Rows that a results file has are
not measured again.

    python -m benchmarks.coverage --kind causal --json docs/results/data/coverage.json
    python -m benchmarks.coverage --types llama,gemma3_text --doors object

`--again failed` or `all` measures rows once more, `--limit` are seconds of a row, after `--minutes`
none begins, `--jobs` run at a time.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers

from benchmarks.calls import compare, expected_of, make_calls, run_call, typed
from benchmarks.coverage_table import DOORS, Row, line, totals
from benchmarks.harness import parse_options, told, write_json
from reroll.export.onnx import Onnx
from reroll.rewrite.capture import capture
from reroll.rewrite.capture.raising import raise_idioms
from reroll.rewrite.capture.rolling import roll_loops
from reroll.rewrite.ir.interpret import complete, run
from reroll.rewrite.ir.program import Program
from tests.tiny import types as tiny_types

BATCH, LENGTH = 2, 24
Work = dict[str, Any]


def measure(row: Row, report: Callable[[Row], None], steps: tuple[str, ...] = ()) -> None:
    """Fill `row` step by step and report after each, so that a crash keeps what was found."""
    known = {"build": _build, "graph": _graph, "roll": _roll}
    known |= {"calls": _calls, "save": _save, "open": _open, "export": _export}
    with tempfile.TemporaryDirectory(prefix="coverage-") as folder:
        work: Work = {"folder": Path(folder)}
        for name in steps or known:
            row.failed = name
            report(row)
            try:
                known[name](row, work)
            except Exception as error:  # the table is the report of what fails
                if name in ("save", "open", "export"):  # a cell; the others may still be right
                    row.cells[name] = f"refused: {told(error)}"
                    continue
                row.reason = told(error)
                report(row)
                return
    row.failed = None
    report(row)


def _build(row: Row, work: Work) -> None:
    """Make the original, as the door has it."""
    model: Any = tiny_types.build(row.type, kind=row.kind)
    row.layers, row.mixing = tiny_types.layer_count(model), tiny_types.token_mixing(model)
    work["given"] = model
    if row.door != "object":
        dtype = torch.bfloat16 if row.door == "bf16" else torch.float32
        work["given"] = str(work["folder"] / "original")
        model.to(dtype).save_pretrained(work["given"])
        # what transformers makes of the directory is the original
        opened = type(model).from_pretrained(
            work["given"], attn_implementation="eager", dtype="auto"
        )
        model = opened.eval()
    work["original"] = model
    tiny_types.run_eager(model, tiny_types.example_inputs(model, BATCH, LENGTH))


def _graph(row: Row, work: Work) -> None:
    """Capture, and compare the flat graph with the original op by op."""
    flat = work["flat"] = capture(work["given"], roll=False)
    calls = [node for node in flat.graph.nodes if node.op == "call_function"]
    row.nodes = len(calls)
    row.attentions = sum("reroll.attention" in str(node.target) for node in calls)
    row.error, row.scale = _difference(flat, work["original"])


def _roll(row: Row, work: Work) -> None:
    """Roll it, as `reroll.capture` does."""
    program = work["program"] = roll_loops(raise_idioms(work["flat"]))
    row.loops = " ".join(f"{each.trips}x{each.period}" for each in program.loops) or "none"
    row.rolled = sum(each.layers for each in program.loops)
    row.rolled_error, _ = _difference(program, work["original"])


def _difference(program: Program, original: Any) -> tuple[float, float]:
    """Largest difference from the original's outputs, and the largest output, where not padded."""
    given = typed(original, tiny_types.example_inputs(original, BATCH, LENGTH))
    names = {each.name for each in program.inputs}
    inputs = complete(program, {name: t for name, t in given.items() if name in names})
    actual = tiny_types.primary_output(SimpleNamespace(**run(program, inputs)))
    actual = tiny_types.valid_outputs(actual, inputs)
    expected = tiny_types.valid_outputs(tiny_types.run_eager(original, given), inputs)
    if actual.shape != expected.shape:
        raise ValueError(f"outputs are {list(actual.shape)}, not {list(expected.shape)}")
    return float((actual - expected).abs().max()), float(expected.abs().max())


def _calls(row: Row, work: Work) -> None:
    """Call the original and the lowered module in every way."""
    original = work["original"]
    work["calls"] = make_calls(original)
    work["expected"], work["dtype"] = expected_of(original, work["calls"]), original.dtype
    row.cells.update(_compared("", work["program"].to_module(), work))


def _compared(prefix: str, module: Any, work: Mapping[str, Any]) -> dict[str, str]:
    cells: dict[str, str] = {}
    for name, given in work["calls"].items():
        found = compare(run_call(module, given), work["expected"][name], given, work["dtype"])
        cells |= {f"{prefix}{name}.{measured}": cell for measured, cell in found.items()}
    return cells


def _save(row: Row, work: Work) -> None:
    work["program"].save(str(work["folder"] / "converted"))
    kept = {name: work[name] for name in ("calls", "expected", "dtype")}
    torch.save(kept, work["folder"] / "expected.pt")


def _open(row: Row, work: Work) -> None:
    """Open what was saved in a process that has imported reroll and captured nothing."""
    if not (work["folder"] / "converted").exists():
        return
    auto_class = work["program"].origin.auto_class
    process, receiver = _started("forkserver", _opened, work["folder"], auto_class)
    try:
        row.cells.update(receiver.recv())
    except EOFError:
        process.join()
        row.cells["open"] = f"refused: the process died with {process.exitcode}"
    process.join()


def _opened(folder: Path, auto_class: str, sender: Connection) -> None:
    """Answer every call from the saved model."""
    _quiet()
    try:
        module = getattr(transformers, auto_class).from_pretrained(folder / "converted")
        given = torch.load(folder / "expected.pt", weights_only=False)
        sender.send(_compared("opened.", module, given))
    except Exception as error:
        sender.send({"open": f"refused: {told(error)}"})


def _export(row: Row, work: Work) -> None:
    """Export to ONNX with `--check`: each graph runs in ONNX Runtime beside the torch module."""
    directory = work["folder"] / "onnx"
    directory.mkdir()
    found = Onnx.make({"check": True}).write(work["program"], directory)
    for kind, graph in found["graphs"].items():
        row.cells[f"export.{kind}"] = f"{graph['check']['relative_rms_error']:.1e}"


def _quiet() -> None:
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)


def _started(method: str, target: Callable[..., None], *arguments: Any) -> tuple[Any, Connection]:
    """A process of its own, which is given the end of a pipe to send to, and the other end."""
    context: Any = get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(*arguments, sender))
    process.start()
    sender.close()
    return process, receiver


def _child(row: Row, sender: Connection) -> None:
    """Measure in a process of its own and send the row after each step."""
    _quiet()
    measure(row, sender.send)
    sender.close()


def measured(row: Row, limit: float) -> Row:
    """`row` filled by a process that is stopped after `limit` seconds."""
    started = time.perf_counter()
    # a fork has everything imported already
    process, receiver = _started("fork", _child, row)
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
    row.seconds = round(time.perf_counter() - started, 1)
    return row


class Results:
    """The rows of a file, which is written anew after each."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: dict[tuple[str, str], Row] = {}
        if path and path.exists():
            for data in json.loads(path.read_text()):
                self.add(Row(**data))

    def add(self, row: Row) -> None:
        """Keep a row, in the place of an older one."""
        self.rows[row.type, row.door] = row

    def write(self) -> None:
        """Write the file whole."""
        if self.path:
            write_json(self.path, [dataclasses.asdict(row) for _, row in sorted(self.rows.items())])


def main() -> None:
    """Measure the rows that are missing, print each, and the totals over all."""
    options = parse_options(
        __doc__, types=str, kind="all", doors=DOORS, again="", limit=240.0, minutes=40.0, jobs=1
    )
    results = Results(options.json)
    known: dict[tiny_types.Kind, list[str]]
    known = {"causal": tiny_types.causal_types(), "encoder": tiny_types.encoder_types()}
    wanted = [
        Row(each, kind, door)
        for kind, types in known.items()
        for each in types
        for door in options.doors
        if options.kind in (kind, "all")
        and (options.types is None or each in options.types.split(","))
        and _due(results.rows.get((each, door)), options.again)
    ]
    end = time.perf_counter() + 60 * options.minutes
    # started before any other thread, and with nothing in it but what a user imports
    get_context("forkserver").set_forkserver_preload(["transformers", "reroll"])

    def run_one(row: Row) -> None:
        if time.perf_counter() < end:
            row = measured(row, options.limit)
            results.add(row)
            results.write()
            print(line(row), flush=True)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(run_one, wanted))
    print(totals(list(results.rows.values())))


def _due(row: Row | None, again: str) -> bool:
    return row is None or again == "all" or (again == "failed" and not row.right)


if __name__ == "__main__":
    main()
