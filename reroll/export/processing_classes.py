"""The classes of tokenizers and processors, which transformers often derives from the model type.

A converted model has a model type of its own. Where its side files name no class, the saved
config.json does, which transformers' auto classes read next. Where they name another class than the
original's model type gives, the copied file is changed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock


class Kind(NamedTuple):
    """An auto class of transformers, the base of the classes it loads, and the files it reads."""

    auto_class: str
    module: str
    base: str
    files: tuple[str, ...]


_PREPROCESSOR = "preprocessor_config.json"
_PROCESSOR = "processor_config.json"
# by the configuration entry that names the class
KINDS = {
    "tokenizer_class": Kind(
        "AutoTokenizer", "tokenization_utils_base", "PreTrainedTokenizerBase",
        ("tokenizer_config.json", "tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model"),
    ),
    "image_processor_type": Kind(
        "AutoImageProcessor", "image_processing_base", "ImageProcessingMixin",
        (_PREPROCESSOR, _PROCESSOR),
    ),
    "feature_extractor_type": Kind(
        "AutoFeatureExtractor", "feature_extraction_utils", "FeatureExtractionMixin",
        (_PREPROCESSOR, _PROCESSOR),
    ),
    "video_processor_type": Kind(
        "AutoVideoProcessor", "video_processing_utils", "BaseVideoProcessor",
        ("video_preprocessor_config.json", _PREPROCESSOR, _PROCESSOR),
    ),
    "processor_class": Kind(
        "AutoProcessor", "processing_utils", "ProcessorMixin",
        (_PROCESSOR, _PREPROCESSOR, "tokenizer_config.json"),
    ),
}  # fmt: skip


def processing_classes(directory: Path) -> dict[str, str]:
    """Return the classes that transformers' auto classes choose, by configuration entry.

    No object is loaded: `from_pretrained` returns the class instead. No code from the directory is
    run. Where transformers would run some, there is no entry.
    """
    import transformers

    kinds = {
        key: kind
        for key, kind in KINDS.items()
        if any((directory / file).is_file() for file in kind.files)
    }
    found = {}
    with _unopened(kinds):
        for key, kind in kinds.items():
            try:
                chosen = getattr(transformers, kind.auto_class).from_pretrained(
                    str(directory), trust_remote_code=False, local_files_only=True
                )
            # the errors of directories without such a class have no common type
            except Exception:
                continue
            # for a directory without a processor, AutoProcessor returns its tokenizer
            if isinstance(chosen, type) and issubclass(chosen, _base(kind)):
                found[key] = chosen.__name__
    return found


def name_classes(directory: Path, wanted: Mapping[str, str]) -> dict[str, str]:
    """Make a saved directory load with the classes that are wanted.

    Changes its config.json, and files that name another class. Returns the entries that were added
    to config.json.
    """
    found = processing_classes(directory)
    entries = {key: name for key, name in wanted.items() if found.get(key) != name}
    if not entries:
        return {}
    _change(directory / "config.json", entries)
    found = processing_classes(directory)
    for key, name in entries.items():
        if found.get(key) == name:
            continue
        for file in KINDS[key].files:
            path = directory / file
            if path.suffix == ".json" and path.is_file() and key in _read(path):
                _change(path, {key: name})
    return entries


@contextmanager
def _unopened(kinds: Mapping[str, Kind]) -> Iterator[None]:
    """Let `from_pretrained` return the class on which it is called."""
    with ExitStack() as stack:
        for kind in kinds.values():
            own = classmethod(lambda cls, *args, **kwargs: cls)
            stack.enter_context(mock.patch.object(_base(kind), "from_pretrained", own))
        yield


def _base(kind: Kind) -> Any:
    return getattr(import_module(f"transformers.{kind.module}"), kind.base)


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _change(path: Path, entries: Mapping[str, str]) -> None:
    data = {**_read(path), **entries}
    indent = 1 if path.name == "config.json" else 2
    text = json.dumps(data, indent=indent, ensure_ascii=False, sort_keys=path.name == "config.json")
    path.write_text(text + "\n", encoding="utf-8")
