"""The files beside a model that a converted one keeps: tokenizer, processor, settings."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path
from typing import Any

GENERATION_FILE = "generation_config.json"


def generation_file(settings: Any) -> str:
    """Write generation settings to a file that stays until the process ends; returns its path."""
    path = temporary_folder("generation") / GENERATION_FILE
    settings.to_json_file(path, keys_to_pop=["compile_config"])
    return str(path)


def temporary_folder(name: str) -> Path:
    """A new folder that is removed when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix=f"reroll-{name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
