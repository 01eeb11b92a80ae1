"""Side files of a model: its tokenizer, preprocessor and similar files."""

from __future__ import annotations

import re
import shutil
from pathlib import Path, PurePosixPath

from reroll.errors import ExportError
from reroll.rewrite.checkpoint.saved import PROGRAM_FILE
from reroll.rewrite.ir.program import Program

# the files that saving a model writes itself
_OWN_FILES = {"config.json", PROGRAM_FILE, "readme.md", "model.safetensors.index.json"}


def copy_side_files(program: Program, directory: Path) -> list[str]:
    """Copy a Program's side files into a directory, unchanged, and return their names."""
    for name, path in program.origin.files.items():
        target = directory / checked_file(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(path, target)
        except OSError as error:
            raise ExportError(
                f"the side file {name} cannot be copied: {error.strerror}", where=str(path)
            ) from error
    return list(program.origin.files)


def checked_file(name: str) -> str:
    """Return a side file's name; raise ExportError if it is unsafe.

    It may not leave the directory, nor be the name of a file that saving writes itself.
    """
    parts = PurePosixPath(name).parts
    bad = not parts or PurePosixPath(name).is_absolute() or {"..", "."} & {*parts, *name.split("/")}
    if bad or re.search(r'[\\:\0"]', name):
        raise ExportError(f"the side file {name!r:.80} would not be in the directory")
    # weights in a folder belong to a module that runs after the model
    own_weights = len(parts) == 1 and name.lower().endswith(".safetensors")
    if name.lower() in _OWN_FILES or own_weights:
        raise ExportError(f"the side file {name!r:.80} would replace a file of the model")
    return name
