"""Side files that a converted model keeps: tokenizer, processor, prompts, settings.

All files in a model's directory are kept, except weights, code, and files that reroll writes
itself. A subfolder with weights is another model, or the same in another format, and is left out.
If `modules.json` lists it as a module of sentence-transformers, it is kept with its weights.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from reroll.writing import temporary_files

GENERATION_FILE = "generation_config.json"
MODULES_FILE = "modules.json"

# more or larger files than a model needs are taken for data
MAX_FILES = 2000
MAX_BYTES = 2**30

_WEIGHTS = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.h5", "*.keras",
    "*.msgpack", "*.ot", "*.gguf", "*.ggml", "*.onnx", "*.onnx_data", "*.onnx.data", "*.tflite",
    "*.mlmodel", "*.nemo", "*.pdparams", "*.engine", "*.index.json",
)  # fmt: skip
_CODE = ("*.py", "*.py[cod]", "*.so", "*.dll", "*.dylib", "*.exe", "*.sh", "*.bat", "*.ps1")
_OWN = ("config.json", "program.json", "readme.md", "adapter_config.json")


def side_files(directory: Path) -> dict[str, str]:
    """Return the side files of a model's directory: paths by relative name."""
    names = []
    for folder, folders, files in os.walk(directory):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        relative = Path(folder).relative_to(directory)
        names += [(relative / file).as_posix() for file in sorted(files)]
        if len(names) > MAX_FILES:
            # the directory holds other things than the model
            names = [name for name in names if "/" not in name]
            break
    modules = module_folders(directory / MODULES_FILE)
    kept = {name: directory / name for name in side_names(names, modules)}
    return {
        name: str(path)
        for name, path in kept.items()
        if path.is_file() and path.stat().st_size <= MAX_BYTES
    }


def side_names(names: Iterable[str], modules: Collection[str]) -> list[str]:
    """Select the side files from a directory's files; `modules` are folders of modules."""
    names = list(names)
    formats = {
        folder
        for name in names
        if _is_weight(name) and (folder := name.partition("/")[0]) != name
        if folder not in modules
    }
    return [name for name in names if _is_side_file(name, formats, modules)]


def weight_names(names: Iterable[str]) -> list[str]:
    """Select a repository's files that may hold the weights that transformers loads."""
    ends = (".safetensors", ".safetensors.index.json")
    # Mistral's own format is a second copy of the same weights
    return [
        n for n in names if n.endswith(ends) and not n.startswith("consolidated") and "/" not in n
    ]


def module_folders(file: Path) -> set[str]:
    """Return the folders of the modules that sentence-transformers runs after the model."""
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        folders = {str(entry["path"]).strip("/") for entry in entries}
    except (OSError, ValueError, TypeError, KeyError):
        return set()
    return folders - {"", "."}


def _is_side_file(name: str, formats: Collection[str], modules: Collection[str]) -> bool:
    parts = PurePosixPath(name).parts
    if any(part.startswith(".") for part in parts) or re.search(r'[\\:\0"]', name):
        return False
    if any(fnmatch(parts[-1].lower(), pattern) for pattern in _CODE):
        return False
    if len(parts) == 1:
        return parts[0].lower() not in _OWN and not _is_weight(name)
    return parts[0] in modules or parts[0] not in formats


def _is_weight(name: str) -> bool:
    return any(fnmatch(PurePosixPath(name).name.lower(), pattern) for pattern in _WEIGHTS)


def generation_file(settings: Any) -> str:
    """Write generation settings to a file that exists until the process ends; return its path.

    The same settings are in the same file.
    """
    # settings that say they are the configuration's are read without entries of their own
    text = settings.to_json_string(keys_to_pop=["compile_config", "_from_model_config"])
    return str(temporary_files((GENERATION_FILE, text.encode())) / GENERATION_FILE)
