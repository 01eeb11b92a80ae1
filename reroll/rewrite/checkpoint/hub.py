"""Find a model's files: in a local directory, or in the hub's snapshot of a repository."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from reroll.errors import UsageError


def directory_of(
    name: str, patterns: Callable[[], list[str] | None] | None = None, **hub: Any
) -> Path:
    """Return the directory of a model: `name` itself if it is one, else the snapshot of a hub id.

    `patterns` returns the wanted files, or None for all. `hub` are options of the hub's library,
    such as `revision`. Raises UsageError if there is neither.
    """
    path = Path(name)
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    options = {key: value for key, value in hub.items() if value is not None}
    try:
        wanted = None if patterns is None else patterns()
        return Path(snapshot_download(name, allow_patterns=wanted, **options))
    except HFValidationError as error:
        raise UsageError(f"{name} is neither a path nor a hub id") from error
    except Exception as error:
        raise UsageError(
            f"cannot get the model {name}: {type(error).__name__}",
            hint="is it a local path that does not exist, or is the hub out of reach?",
        ) from error


def file_of(name: str, file: str, revision: str | None = None) -> Path:
    """Return the path of one file of a model, which is downloaded if the model is a hub id.

    Exceptions of the hub's library are not caught.
    """
    if Path(name).exists():
        return Path(name) / file
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(name, file, revision=revision))
