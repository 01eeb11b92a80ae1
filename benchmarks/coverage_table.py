"""The rows of `benchmarks.coverage` as text: a line each, totals, and a page's tables."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.calls import passed

if TYPE_CHECKING:
    from benchmarks.coverage import Row

_BEGIN, _END = "<!-- generated: coverage -->", "<!-- end of generated -->"


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
    doors = dict.fromkeys(row.door for row in rows)
    lines = []
    for door in doors:
        of_door = [row for row in rows if row.door == door]
        counts = {
            "types": len(of_door),
            "captured": sum(row.nodes is not None for row in of_door),
            "flat bit-identical": sum(row.exact for row in of_door),
            "rolled": sum(bool(row.rolled) for row in of_door),
            "right in every call": sum(map(called, of_door)),
            "exported and run": sum(map(exports, of_door)),
            "wrong without an error": sum(_silent(row) for row in of_door),
        }
        lines.append(f"{door}: " + ", ".join(f"{name} {count}" for name, count in counts.items()))
    return "\n".join(lines)


def _silent(row: Row) -> bool:
    return any(cell.startswith("wrong") for cell in row.cells.values())


def write_table(page: Path, rows: Sequence[Row]) -> None:
    """Put the tables in the place of those that a page has between its two marks."""
    text = page.read_text()
    pattern = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)
    body = f"{_BEGIN}\n\n{_tables(rows)}\n{_END}"
    if not pattern.search(text):
        raise SystemExit(f"{page} has no lines {_BEGIN} and {_END}")
    page.write_text(pattern.sub(lambda _: body, text))


def _tables(rows: Sequence[Row]) -> str:
    parts = []
    for kind in dict.fromkeys(row.kind for row in rows):
        of_kind = [row for row in rows if row.kind == kind]
        parts += [f"### {kind.capitalize()} models", "", _counts(of_kind), _refusals(of_kind)]
        parts += [_by_type(of_kind)]
    return "\n".join(parts)


def _counts(rows: Sequence[Row]) -> str:
    doors = list(dict.fromkeys(row.door for row in rows))
    measures: dict[str, Callable[[Row], int]] = {
        "types measured": lambda row: True,
        "captured": lambda row: row.nodes is not None,
        "flat program bit-identical": lambda row: row.exact,
        "layers rolled into loops": lambda row: bool(row.rolled),
        "right in every call, also saved and opened again": called,
        "exported to ONNX and right there": exports,
        "a cell is wrong without an error": _silent,
        "rows of tokens that part within rounding": lambda row: _ties(row),
    }
    lines = [f"| | {' | '.join(doors)} |", f"| --- |{' ---: |' * len(doors)}"]
    for name, count in measures.items():
        numbers = [str(sum(count(row) for row in rows if row.door == door)) for door in doors]
        lines.append(f"| {name} | {' | '.join(numbers)} |")
    return "\n".join(lines) + "\n"


def _ties(row: Row) -> int:
    return sum(int(cell.split()[1]) for cell in row.cells.values() if cell.startswith("ties"))


def _refusals(rows: Sequence[Row]) -> str:
    """What is refused or fails, by reason, with the types and doors that it concerns."""
    by_reason: dict[str, Counter[str]] = {}
    for row in rows:
        if text := reason(row):
            # the step and the model's class differ where the reason is one
            key = re.sub(r"^\S+: ", "", text, count=1)
            key = re.sub(r"\bReroll\w+: |\b\w+For\w+: ", "", key).replace("|", "/")
            by_reason.setdefault(key, Counter())[row.type] += 1
    if not by_reason:
        return ""
    lines = ["| refused or failing, by its first reason | types (doors) |", "| --- | --- |"]
    for text, types in sorted(by_reason.items(), key=lambda item: -len(item[1])):
        names = ", ".join(f"{name} ({count})" for name, count in types.items())
        lines.append(f"| {text} | {names} |")
    return "\n".join(lines) + "\n"


def _by_type(rows: Sequence[Row]) -> str:
    doors = list(dict.fromkeys(row.door for row in rows))
    lines = [
        f"| type | layers | loops | {' | '.join(doors)} |",
        f"| --- | ---: | --- |{' --- |' * len(doors)}",
    ]
    for name in dict.fromkeys(row.type for row in rows):
        of_type = {row.door: row for row in rows if row.type == name}
        first = next(iter(of_type.values()))
        cells = [_summary(of_type[door]) if door in of_type else "" for door in doors]
        lines.append(
            f"| {name} | {first.layers or '-'} | {first.loops or '-'} | {' | '.join(cells)} |"
        )
    return "\n".join(lines) + "\n"


def _summary(row: Row) -> str:
    """Calls and exports of a row in a few signs."""
    if row.failed and not row.cells:
        return f"no ({row.failed})"
    return f"{score(row)}{'' if exports(row) else ', no ONNX'}"
