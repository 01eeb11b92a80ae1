"""Save a Program as a Hugging Face directory, which loads with `from_pretrained`.

config.json              the configuration, for transformers
program.json             the Program: graphs, weight table, recipe; no code
model.safetensors        every distinct weight once, or shards of them with an index
draft/program.json       the draft, if the Program has one: it reads the weights of the model
draft/model.safetensors  the weights that it has beside those, if there are any
README.md                the model card
tokenizer.json, ...      the original's side files; only the class that they name may change

`import reroll` registers the classes that `from_pretrained` needs.
"""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from reroll.errors import UsageError
from reroll.export.model_card import model_card
from reroll.export.processing_classes import KINDS, name_classes, processing_classes
from reroll.export.shards import Progress, save_outputs
from reroll.export.side_files import copy_side_files
from reroll.rewrite.checkpoint import SafetensorsSource
from reroll.rewrite.checkpoint.saved import DRAFT_FOLDER, PROGRAM_FILE, digest, load_program
from reroll.rewrite.ir.drafts import shared
from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.text.serialize import program_to_json
from reroll.rewrite.ir.weights import WeightTable
from reroll.rewrite.ir.weights.evaluation import Output
from reroll.rewrite.ir.weights.expressions import Expr, Source, walk
from reroll.writing import filled_directory, new_directory

if TYPE_CHECKING:
    from reroll.runtime.models.config import RerollConfig

_WEIGHT_FILES = (
    "model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json"
)  # fmt: skip
_DRAFT_FILES = (PROGRAM_FILE, *_WEIGHT_FILES)


def save(
    program: Program,
    directory: str | Path,
    *,
    overwrite: bool | Literal["files"] = False,
    progress: Progress | None = None,
    config: RerollConfig | None = None,
) -> None:
    """Write a Program to a directory, which appears whole or not at all.

    Weights are computed and written one shard at a time. `progress` is called with the bytes
    written and the total. With `overwrite`, an existing directory is replaced. With "files", only
    its files of the same names and its former weights are. Loading what was saved and saving it
    again gives the same bytes. `config` is the configuration to write, by default the Program's
    own.

    Raises UsageError if the directory exists or cannot be written, or if the Program was captured
    from it. Raises ExportError if the disk is full, or if a side file is missing or its name leads
    out of the directory.
    """
    place = Path(directory).resolve()
    read = [Path(p).resolve() for p in program.origin.paths if Path(p).exists()]
    # a directory that reroll saved may be replaced: the new one is complete before that
    if (place / PROGRAM_FILE).is_file():
        read = [p for p in read if p not in (place, *place.parents)]
    if overwrite != "files":
        with new_directory(directory, overwrite=overwrite, sources=read) as temporary:
            _write(program, temporary, progress, config)
        return
    if place in read:
        raise UsageError(
            "the model was captured from there, and its files would be replaced",
            where=str(directory),
            hint="name another directory",
        )
    # weights and a draft of an earlier save are removed, because loading would read them, too
    old = (*_WEIGHT_FILES, *(f"{DRAFT_FOLDER}/{name}" for name in _DRAFT_FILES))
    filled = filled_directory(place, without=old)
    with filled if place.is_dir() else new_directory(place) as temporary:
        _write(program, temporary, progress, config)


def load(directory: str | Path) -> Program:
    """Load the Program of a directory that `save` wrote: `reroll.rewrite.checkpoint.saved`."""
    return load_program(directory)


def _write(
    program: Program, directory: Path, progress: Progress | None, config: RerollConfig | None
) -> None:
    files = copy_side_files(program, directory)
    stored = with_saved_weights(program, directory, progress)
    origin = replace(program.origin, files={name: name for name in files})
    _write_config(replace(stored, origin=origin), directory, config)
    classes = name_classes(directory, _classes(program))
    stored = replace(stored, origin=replace(origin, config={**origin.config, **classes}))
    data = program_to_json(stored)
    write_json(directory / PROGRAM_FILE, data)
    if program.draft is not None:
        draft = _with_saved_draft(program, program.draft, stored, directory / DRAFT_FOLDER)
        saved = {"draft_of": digest(data), "program": program_to_json(draft)}
        write_json(directory / DRAFT_FOLDER / PROGRAM_FILE, saved)
    (directory / "README.md").write_text(model_card(stored), encoding="utf-8")


def _classes(program: Program) -> dict[str, str]:
    """Return the classes of tokenizer and processors that the original's directory gives."""
    names = {file for kind in KINDS.values() for file in kind.files}
    files = {name: path for name, path in program.origin.files.items() if name in names}
    folders = dict.fromkeys(Path(path).parent for path in files.values())
    found: dict[str, str] = {}
    for folder in folders:
        found = {**processing_classes(folder), **found}
    return found


def _write_config(program: Program, directory: Path, given: RerollConfig | None) -> None:
    from reroll.runtime.models.auto import model_class
    from reroll.runtime.models.config import RerollConfig

    config = RerollConfig.from_program(program) if given is None else deepcopy(given)
    config.dtype = program.dtype
    config.architectures = [model_class(program).__name__]
    config.program_file = PROGRAM_FILE
    write_json(directory / "config.json", json.loads(config.to_json_string()), sort_keys=True)


def with_saved_weights(program: Program, directory: Path, progress: Progress | None) -> Program:
    """Write every distinct weight once, and return the Program over the tensors in the files."""
    saved = {
        key: Output(
            program.weights.stored_name(name, entry), 0, program.weights[name].entries[entry]
        )
        for key, (name, entry) in program.weights.distinct().items()
    }
    save_outputs(list(saved.values()), program.source, directory, progress)

    def source(name: str, entry: int) -> Source:
        output = saved[program.weights.identity(name, entry)]
        return Source(output.name, output.expr.meta)

    table = {
        name: replace(weight, entries=tuple(source(name, i) for i in range(len(weight.entries))))
        for name, weight in program.weights.items()
    }
    return replace(
        program,
        weights=WeightTable(table),
        reference=WeightTable(),
        source=SafetensorsSource(directory),
    )


def _with_saved_draft(program: Program, draft: Program, stored: Program, folder: Path) -> Program:
    """Write the weights that a draft has beside its Program's; return it over those of both.

    `stored` is the Program over the tensors that are saved.
    """
    folder.mkdir()
    both = shared(program, draft)
    places = {
        key: (name, entry)
        for key, (name, entry) in draft.weights.distinct().items()
        if (name, entry) not in both
    }
    names = {o.name for o in _sources(stored)}
    prefix = f"{DRAFT_FOLDER}."
    while any(name.startswith(prefix) for name in names):
        prefix = f"_{prefix}"
    added = {
        key: Output(
            prefix + draft.weights.stored_name(name, entry), 0, draft.weights[name].entries[entry]
        )
        for key, (name, entry) in places.items()
    }
    if added:
        save_outputs(list(added.values()), draft.source, folder)

    def source(name: str, entry: int) -> Expr:
        if (name, entry) in both:
            other, number = both[name, entry]
            return stored.weights[other].entries[number]
        output = added[draft.weights.identity(name, entry)]
        return Source(output.name, output.expr.meta)

    table = {
        name: replace(weight, entries=tuple(source(name, i) for i in range(len(weight.entries))))
        for name, weight in draft.weights.items()
    }
    # its side files and configuration are the model's
    origin = replace(draft.origin, files={}, config=stored.origin.config)
    return replace(draft, weights=WeightTable(table), reference=WeightTable(), origin=origin)


def _sources(program: Program) -> list[Source]:
    roots = (entry for weight in program.weights.values() for entry in weight.entries)
    return [expr for expr in walk(roots) if isinstance(expr, Source)]


def write_json(path: Path, data: Any, sort_keys: bool = False) -> None:
    """Write JSON data to a file, each entry on a line of its own."""
    text = json.dumps(data, indent=1, ensure_ascii=False, sort_keys=sort_keys) + "\n"
    path.write_text(text, encoding="utf-8")
