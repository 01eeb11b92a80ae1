"""Read a directory that reroll saved. It holds data and names of ops, and no code is run."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from reroll.errors import CheckpointError, UsageError, located
from reroll.rewrite.checkpoint import ChainSource, SafetensorsSource
from reroll.rewrite.checkpoint.safetensors_files import has_safetensors
from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.text.serialize import program_from_json

PROGRAM_FILE = "program.json"
# the folder of a draft, whose program file reads the weights beside the folder as well
DRAFT_FOLDER = "draft"


def load_program(directory: str | Path) -> Program:
    """Load a Program from a directory that reroll saved; weights are read when needed.

    Raises UsageError if reroll did not save the directory, and CheckpointError or ProgramError if a
    file in it is damaged.
    """
    directory = Path(directory)
    config = _read(directory / "config.json")
    if config.get("model_type") != "reroll":
        raise UsageError(
            "reroll did not save this model", where=str(directory), hint="capture it instead"
        )
    name = config.get("program_file", PROGRAM_FILE)
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*\.json", name, re.ASCII):
        raise CheckpointError(
            f"{name!r:.80} is not the name of a file beside it", where="config.json"
        )
    source = SafetensorsSource(directory)
    data = _read(directory / name)
    with located(name):
        program = program_from_json(data, source)
    draft = _load_draft(directory, data, source)
    return with_files_in(replace(program, draft=draft), directory)


def _load_draft(directory: Path, data: dict[str, Any], source: SafetensorsSource) -> Program | None:
    """Load the draft of a Program with this JSON; None if there is none.

    Raises CheckpointError if it was saved with another program.
    """
    folder = directory / DRAFT_FOLDER
    if not (folder / PROGRAM_FILE).is_file():
        return None
    saved = _read(folder / PROGRAM_FILE)
    where = f"{DRAFT_FOLDER}/{PROGRAM_FILE}"
    if saved.get("draft_of") != digest(data):
        raise CheckpointError(
            "the draft is that of another program",
            where=str(folder),
            hint=f"remove the folder, or convert again: reroll convert MODEL {directory} --draft "
            "PASSES",
        )
    own = [SafetensorsSource(folder)] if has_safetensors(folder) else []
    with located(where):
        return program_from_json(saved.get("program"), ChainSource([*own, source]))


def digest(data: dict[str, Any]) -> str:
    """Return the SHA-256 of a Program's JSON without its origin: its dtype, graphs and weights."""
    parts = [data.get(key) for key in ("dtype", "graphs", "weights")]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def with_files_in(program: Program, directory: Path) -> Program:
    """Point a Program's side files to those that exist in a directory."""
    files = {name: str(directory / name) for name in program.origin.files}
    files = {name: path for name, path in files.items() if Path(path).is_file()}
    return replace(program, origin=replace(program.origin, files=files))


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(
            f"there is no {path.name}",
            where=str(path.parent),
            hint="name a directory that reroll saved",
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot be read: {error}", where=str(path)) from error
    if not isinstance(data, dict):
        raise CheckpointError("is not a JSON object", where=str(path))
    return data
