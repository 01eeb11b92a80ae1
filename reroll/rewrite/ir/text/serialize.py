"""Convert a Program to JSON: its graphs as lines of text, its weight table and its origin.

Graphs have one format only, the text of `reroll.rewrite.ir.text.printer`; the JSON holds its lines.
The weights, which are large, and the origin, which is data of others, are JSON values.
"""

from __future__ import annotations

import copyreg
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from reroll.errors import ProgramError, located
from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.text.literals import WORDS, value_to_text
from reroll.rewrite.ir.text.origin_json import origin_from_json, origin_to_json
from reroll.rewrite.ir.text.parser import assemble
from reroll.rewrite.ir.text.printer import graph_lines
from reroll.rewrite.ir.text.sections import read
from reroll.rewrite.ir.verify import verify
from reroll.rewrite.ir.weights import table_from_json, table_to_json
from reroll.rewrite.ir.weights.expressions import TensorSource
from reroll.writing import is_temporary, temporary_files

FORMAT = 1


def program_to_json(program: Program) -> dict[str, Any]:
    """Convert a Program to a JSON object; ProgramError if it is not well formed."""
    verify(program)
    return {
        "format": FORMAT,
        "dtype": value_to_text(program.dtype),
        "halves": [value_to_text(half) for half in program.halves],
        "graphs": list(graph_lines(program)),
        "weights": table_to_json(program.weights),
        "reference": table_to_json(program.reference),
        "origin": origin_to_json(program.origin),
    }


def program_from_json(data: object, source: TensorSource | None = None) -> Program:
    """Read a Program from a JSON object; `source` has the tensors of its weights.

    Raises ProgramError, with the position in the JSON, if it is not a valid Program or has an
    unknown format version. So it does if the weights do not fit the source.
    """
    if not isinstance(data, dict):
        raise ProgramError(f"a program is a JSON object, not a {type(data).__name__}")
    _check_format(data.get("format"))
    wanted = {"format", "dtype", "halves", "graphs", "weights", "reference", "origin"}
    # earlier versions did not write `halves`
    data = {"halves": [], **data}
    for key in sorted(wanted ^ set(data)):
        raise ProgramError(f"the key {key!r:.80} is {'missing' if key in wanted else 'unknown'}")
    dtype = _dtype(data["dtype"], "dtype")
    if not isinstance(data["halves"], list):
        raise ProgramError(f"{data['halves']!r:.80} is not a list", where="halves")
    halves = tuple(_dtype(half, "halves") for half in data["halves"])
    lines = data["graphs"]
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise ProgramError("the graphs are a list of lines", where="graphs")
    with located("graphs"):
        draft = read(lines)
    draft.dtype, draft.halves = dtype, halves
    with located("weights"):
        draft.weights = table_from_json(data["weights"])
    with located("reference"):
        draft.reference = table_from_json(data["reference"])
    with located("origin"):
        draft.origin = origin_from_json(data["origin"])
    with located("graphs"):
        return assemble(draft, source)


def _reduce(program: Program) -> tuple[Any, ...]:
    """Pickle a Program as its JSON, its source of tensors, and the files that this process removes.

    These are the settings of a model object, for example, or the tokenizer in a GGUF file.
    """
    files = program.origin.files.items()
    contents = {name: Path(path).read_bytes() for name, path in files if is_temporary(path)}
    return _unpickled, (program_to_json(program), program.source, contents, program.draft)


def _unpickled(
    data: Any, source: Any, contents: dict[str, bytes], draft: Program | None = None
) -> Program:
    program = replace(program_from_json(data, source), draft=draft)
    if not contents:
        return program
    folder = temporary_files(*contents.items())
    files = {**program.origin.files, **{name: str(folder / name) for name in contents}}
    return replace(program, origin=replace(program.origin, files=files))


copyreg.pickle(Program, _reduce)


def _dtype(value: object, where: str) -> torch.dtype:
    dtype = WORDS.get(value) if isinstance(value, str) else None
    if not isinstance(dtype, torch.dtype):
        raise ProgramError(f"{value!r:.80} is not a dtype", where=where)
    return dtype


def _check_format(version: object) -> None:
    if type(version) is not int or version < 1:
        raise ProgramError("this is not a program of reroll: it has no format number")
    if version > FORMAT:
        raise ProgramError(
            f"the program has format {version}, and this reroll reads formats up to {FORMAT}",
            where="format",
            hint="a newer reroll wrote it, and reads it: pip install -U reroll",
        )
