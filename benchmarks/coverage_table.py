"""The rows of `benchmarks.coverage`: a line each, totals, and the tables of a page."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

from benchmarks.calls import passed
from benchmarks.harness import markdown
from tests.tiny.types import Kind

Door = Literal["object", "directory", "bf16"]
DOORS: tuple[Door, ...] = get_args(Door)


@dataclass
class Row:
    """What happened to one model type by one door; a field is None where a step before it failed.

    `error` is the largest difference of the flat program, run by the reference of each op, from the
    original's outputs, `scale` the largest output. `loops` lists each loop as trips x layers per
    trip, `rolled` adds them up. `cells` are by "call.measure", "opened.call.measure" and
    "export.graph"; "save", "open" or "export" holds the refusal of the whole step.
    """

    type: str
    kind: Kind
    door: Door = "object"
    layers: int | None = None
    mixing: str | None = None
    nodes: int | None = None
    attentions: int | None = None
    error: float | None = None
    scale: float | None = None
    loops: str | None = None
    rolled: int | None = None
    rolled_error: float | None = None
    cells: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    failed: str | None = None
    reason: str | None = None

    @property
    def exact(self) -> bool:
        """Whether the flat program computes the original's outputs bit for bit."""
        return self.error == 0.0

    @property
    def right(self) -> bool:
        """Whether every step succeeded and no cell is wrong or refused."""
        return self.failed is None and all(map(passed, self.cells.values()))


def line(row: Row) -> str:
    """One row as a line of the terminal."""
    error = "-" if row.error is None else "0" if row.exact else f"{row.error:.1e}"
    rolled = "-" if row.rolled is None else f"{row.rolled}/{row.layers}"
    columns = [
        f"{row.type:28s} {row.door:9s} {row.mixing or '-':9s} {error:>8s} {rolled:>6s}",
        f"{row.loops or '-':12s} {score(row):>7s} {row.seconds:5.1f}s {reason(row)}",
    ]
    return " ".join(columns).rstrip()


def score(row: Row) -> str:
    """How many cells are right, of how many."""
    counted = [cell for cell in row.cells.values() if cell != "-"]
    return f"{sum(map(passed, counted))}/{len(counted)}"


def reason(row: Row) -> str:
    """Why a row is not right: the step that failed, or the first cell that is wrong."""
    if row.failed:
        return f"{row.failed}: {row.reason}"
    bad = [f"{name}: {cell}" for name, cell in row.cells.items() if not passed(cell)]
    more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
    return bad[0] + more if bad else ""


def exports(row: Row) -> bool:
    """Whether every graph was exported, ran, and was right."""
    graphs = [cell for name, cell in row.cells.items() if name.startswith("export")]
    return bool(graphs) and all(map(passed, graphs))


def called(row: Row) -> bool:
    """Whether the module, and the saved model in a fresh process, are right in every call."""
    cells = [cell for name, cell in row.cells.items() if not name.startswith("export")]
    return row.failed in (None, "export") and bool(cells) and all(map(passed, cells))


def totals(rows: Sequence[Row]) -> str:
    """How far all rows got, as text."""
    return "\n".join(_counts(rows))


def tables(kind: Kind) -> dict[str, Callable[[Sequence[dict[str, Any]]], list[str]]]:
    """How each table of a kind of models is made of the rows of a file."""

    def table(part: Callable[[Sequence[Row]], list[str]], content: Any) -> list[str]:
        return part([row for row in (Row(**each) for each in content) if row.kind == kind])

    parts = {"counts": _counts, "refusals": _refusals, "types": _by_type}
    return {name: partial(table, part) for name, part in parts.items()}


def _counts(rows: Sequence[Row]) -> list[str]:
    doors = [door for door in DOORS if any(row.door == door for row in rows)]
    measures: dict[str, Callable[[Row], int]] = {
        "types measured": lambda row: True,
        "captured": lambda row: row.nodes is not None,
        "flat program bit-identical": lambda row: row.exact,
        "layers rolled into loops": lambda row: bool(row.rolled),
        "right in every call, also saved and opened again": called,
        "exported to ONNX and right there": exports,
        "a cell is wrong without an error": lambda row: bool(_cells(row, "wrong")),
        "rows of tokens that part within rounding": lambda row: sum(
            int(cell.split()[1]) for cell in _cells(row, "ties")
        ),
    }
    cells = [
        {"": name} | {d: sum(count(row) for row in rows if row.door == d) for d in doors}
        for name, count in measures.items()
    ]
    return markdown({"": "{}"} | dict.fromkeys(doors, "{:}"), cells)


def _cells(row: Row, word: str) -> list[str]:
    return [cell for cell in row.cells.values() if cell.startswith(word)]


def _refusals(rows: Sequence[Row]) -> list[str]:
    """What is refused or fails, by reason, with the types and doors that it concerns."""
    by_reason: dict[str, Counter[str]] = {}
    for row in rows:
        if text := reason(row):
            # the step and the model's class differ where the reason is one
            key = re.sub(r"^\S+: ", "", text, count=1)
            key = re.sub(r"\bReroll\w+: |\b\w+For\w+: ", "", key).replace("|", "/")
            by_reason.setdefault(key, Counter())[row.type] += 1
    title, types = "refused or failing, by its first reason", "types (doors)"
    cells = [
        {title: text, types: ", ".join(f"{name} ({count})" for name, count in found.items())}
        for text, found in sorted(by_reason.items(), key=lambda item: -len(item[1]))
    ]
    return markdown({title: "{}", types: "{}"}, cells)


def _by_type(rows: Sequence[Row]) -> list[str]:
    """Types by what becomes of them at each door: those that fare alike are one row."""
    doors = [door for door in DOORS if any(row.door == door for row in rows)]
    alike: dict[tuple[str, ...], list[str]] = {}
    for name in sorted({row.type for row in rows}):
        by_door = {row.door: row for row in rows if row.type == name}
        summary = tuple(_summary(by_door[door]) if door in by_door else "" for door in doors)
        alike.setdefault(summary, []).append(name)
    cells = [
        {"types": ", ".join(names)} | dict(zip(doors, summary, strict=True))
        for summary, names in sorted(alike.items(), key=lambda item: -len(item[1]))
    ]
    return markdown(dict.fromkeys(doors, "{}") | {"types": "{}"}, cells)


def _summary(row: Row) -> str:
    """Calls and exports of a row in a few signs."""
    if row.failed and not row.cells:
        return f"no ({row.failed})"
    right = "all right" if called(row) else score(row)
    return f"{right}{'' if exports(row) else ', no ONNX'}"
