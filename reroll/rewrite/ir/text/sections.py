"""Parse the lines and sections of a program's text into a Draft.

The text may be untrusted: nothing is evaluated or imported, and names are looked up by
`op_names.resolve` only. The grammar is in `text.printer`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from reroll.errors import ProgramError, located
from reroll.rewrite.ir.records import Body, Input, Origin
from reroll.rewrite.ir.text.cursor import Cursor
from reroll.rewrite.ir.text.graph_parser import (
    Placeholder,
    Statement,
    build_graph,
    read_statement,
    read_type,
)
from reroll.rewrite.ir.text.literals import WORDS
from reroll.rewrite.ir.text.origin_json import origin_from_json
from reroll.rewrite.ir.verify import MAIN
from reroll.rewrite.ir.weights import WeightTable, table_from_text

MAX_LINES = 2**20


@dataclass
class Draft:
    """Parts of a Program read so far, with their lines in the text."""

    dtype: torch.dtype | None = None
    halves: tuple[torch.dtype, ...] = ()
    model: str = ""
    inputs: list[Input] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    graph: fx.Graph | None = None
    bodies: dict[str, Body] = field(default_factory=dict)
    weights: WeightTable | None = None
    reference: WeightTable = field(default_factory=WeightTable)
    origin: Origin | None = None
    opened: dict[str, int] = field(default_factory=dict)
    lines: dict[fx.Node, int] = field(default_factory=dict)


def read(lines: Sequence[str]) -> Draft:
    """Read the sections of a program; ProgramError with the line at fault."""
    if len(lines) > MAX_LINES:
        raise ProgramError(f"the text has more than {MAX_LINES:,} lines")
    draft = Draft()
    position = 0
    while position < len(lines):
        line = lines[position]
        stripped = line.strip()
        first, _, _ = stripped.partition(" ")
        position += 1
        if not stripped or stripped.startswith("#"):
            continue
        with located(f"line {position}"):
            if first in _LINES:
                _LINES[first](draft, line)
                continue
            if first not in _SECTIONS:
                known = ", ".join([*_LINES, *_SECTIONS])
                raise ProgramError(f"no line starts with {first!r:.40}", hint=f"known: {known}")
            stop = position
            while stop < len(lines) and lines[stop].rstrip() != "}":
                stop += 1
            if stop == len(lines):
                raise ProgramError(f"the section {first!r} is not closed by a line with `}}`")
        _SECTIONS[first](draft, position, lines[position - 1 : stop + 1])
        position = stop + 1
    return draft


# ---- lines


def _program(draft: Draft, line: str) -> None:
    if draft.dtype is not None:
        raise ProgramError("there are two lines `program`")
    cursor = Cursor(line)
    cursor.expect("program")
    cursor.expect("dtype")
    cursor.expect("=")
    dtype = WORDS.get(cursor.take("word", "a dtype"))
    if not isinstance(dtype, torch.dtype):
        raise ProgramError("the program's dtype is not a dtype", hint="such as f32 or bf16")
    if cursor.accept("halves"):
        cursor.expect("=")
        cursor.expect("[")
        halves, _ = cursor.values("]")
        if not all(isinstance(half, torch.dtype) for half in halves):
            raise ProgramError("the program's halves are not dtypes", hint="such as [bf16, f16]")
        draft.halves = tuple(halves)
    cursor.expect("model")
    cursor.expect("=")
    draft.dtype, draft.model = dtype, cursor.string()
    cursor.end()


def _input(draft: Draft, line: str) -> None:
    cursor = Cursor(line)
    cursor.expect("input")
    name = cursor.name()
    cursor.expect(":")
    type_ = cursor.tensor_type()
    cursor.expect("role")
    cursor.expect("=")
    draft.inputs.append(Input(name, type_, cursor.name()))
    cursor.end()


def _output(draft: Draft, line: str) -> None:
    cursor = Cursor(line)
    cursor.expect("output")
    draft.outputs.append(cursor.name())
    cursor.end()


_LINES: dict[str, Callable[[Draft, str], None]] = {
    "program": _program,
    "input": _input,
    "output": _output,
}


# ---- sections


def _graph(draft: Draft, number: int, lines: Sequence[str]) -> None:
    with located(f"line {number}"):
        cursor = Cursor(lines[0])
        cursor.expect("graph")
        cursor.expect(MAIN)
        _open(draft, MAIN, number)
        placeholders = _placeholders(cursor)
        cursor.expect("{")
        cursor.end()
        if len(placeholders) != len(draft.inputs):
            raise ProgramError(
                f"the graph takes {len(placeholders)} inputs, and {len(draft.inputs)} are declared",
                hint="declare each with a line `input` before the graph",
            )
        pairs = zip(placeholders, draft.inputs, strict=True)
        named = [Placeholder(p.name, i.name, p.type or i.type) for p, i in pairs]
    draft.graph = _built(draft, number, lines, named)


def _default(draft: Draft, number: int, lines: Sequence[str]) -> None:
    with located(f"line {number}"):
        cursor = Cursor(lines[0])
        cursor.expect("default")
        name = cursor.name()
        _open(draft, f"default {name}", number)
        placeholders = _placeholders(cursor)
        cursor.expect("{")
        cursor.end()
        at = next((i for i, item in enumerate(draft.inputs) if item.name == name), None)
        if at is None:
            raise ProgramError(f"there is no input {name!r:.80} before its default")
    graph = _built(draft, number, lines, placeholders)
    draft.inputs[at] = replace(draft.inputs[at], default=graph)


def _body(draft: Draft, number: int, lines: Sequence[str]) -> None:
    with located(f"line {number}"):
        cursor = Cursor(lines[0])
        cursor.expect("body")
        name = cursor.name()
        _open(draft, f"body {name}", number)
        placeholders = _placeholders(cursor)
        cursor.expect("period")
        cursor.expect("=")
        period = cursor.integer()
        cursor.expect("{")
        cursor.end()
    draft.bodies[name] = Body(_built(draft, number, lines, placeholders), period)


def _built(
    draft: Draft, number: int, lines: Sequence[str], placeholders: Sequence[Placeholder]
) -> fx.Graph:
    """Build the graph of a section whose first line has this number, and keep its nodes' lines."""
    statements = list(_statements(number, lines))
    graph, nodes = build_graph(placeholders, statements, number, number + len(lines) - 1)
    draft.lines.update(nodes)
    return graph


def _open(draft: Draft, section: str, number: int) -> None:
    if section in draft.opened:
        raise ProgramError(f"the section {section!r} is there twice")
    draft.opened[section] = number


def _placeholders(cursor: Cursor) -> list[Placeholder]:
    placeholders = []
    cursor.expect("(")
    while not cursor.accept(")"):
        name = cursor.node()
        placeholders.append(Placeholder(name, name, *read_type(cursor)))
        if cursor.token != ")":
            cursor.expect(",")
    return placeholders


def _statements(number: int, lines: Sequence[str]) -> Iterable[Statement]:
    for i, line in enumerate(lines[1:-1], number + 1):
        if line.strip() and not line.strip().startswith("#"):
            with located(f"line {i}"):
                yield read_statement(i, line)


def _weights(draft: Draft, number: int, lines: Sequence[str]) -> None:
    draft.weights = _table(draft, "weights", number, lines)


def _reference(draft: Draft, number: int, lines: Sequence[str]) -> None:
    draft.reference = _table(draft, "reference", number, lines)


def _table(draft: Draft, section: str, number: int, lines: Sequence[str]) -> WeightTable:
    _heading(draft, section, number, lines[0])
    # blank lines replace the preceding text, so that line numbers in errors are correct
    text = "\n" * number + "\n".join(lines[1:-1])
    try:
        return table_from_text(text)
    except ProgramError as error:
        # errors in the table as a whole have no line of their own
        raise ProgramError(error.message, error.where or f"line {number}", error.hint) from None


def _origin(draft: Draft, number: int, lines: Sequence[str]) -> None:
    _heading(draft, "origin", number, lines[0])
    try:
        data = json.loads("{" + "\n".join(lines[1:]))
    except json.JSONDecodeError as error:
        line = number + error.lineno - 1
        raise ProgramError(f"this is not JSON: {error.msg}", f"line {line}") from None
    except (RecursionError, ValueError) as error:
        reason = "nests too deep" if isinstance(error, RecursionError) else "has too long a number"
        raise ProgramError(f"the JSON {reason}", f"line {number}") from None
    with located(f"line {number}"):
        draft.origin = origin_from_json({**data, "model": draft.model})


def _heading(draft: Draft, section: str, number: int, line: str) -> None:
    with located(f"line {number}"):
        cursor = Cursor(line)
        cursor.expect(section)
        cursor.expect("{")
        cursor.end()
        _open(draft, section, number)


_SECTIONS: dict[str, Callable[[Draft, int, Sequence[str]], None]] = {
    "default": _default,
    "graph": _graph,
    "body": _body,
    "weights": _weights,
    "reference": _reference,
    "origin": _origin,
}
