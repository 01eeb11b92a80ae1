"""Checkpoints as pickled files of torch (`pytorch_model.bin`), read without running any code."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reroll.errors import CheckpointError
from reroll.rewrite.checkpoint.safetensors_header import DOWNLOAD_AGAIN, read_index
from reroll.rewrite.ir.weights.sources import MemorySource

SINGLE_FILE = "pytorch_model.bin"
INDEX_FILE = "pytorch_model.bin.index.json"


class PickledSource(MemorySource):
    """Source of the tensors in `pytorch_model.bin` or its shards, memory-mapped where possible.

    Raises CheckpointError if a file is missing or damaged, or holds more than tensors.
    """

    def __init__(self, directory: str | Path) -> None:
        index = Path(directory) / INDEX_FILE
        single = Path(directory) / SINGLE_FILE
        files = [single] if single.is_file() else sorted(set(read_index(index, ".bin").values()))
        tensors: dict[str, Tensor] = {}
        for file in files:
            tensors.update(_read(file))
        super().__init__(tensors, str(directory))

    @staticmethod
    def is_in(directory: str | Path) -> bool:
        """Whether a directory has pickled weights."""
        return any((Path(directory) / name).is_file() for name in (SINGLE_FILE, INDEX_FILE))


def _read(file: Path) -> dict[str, Tensor]:
    try:
        tensors = _load(file)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            "it is damaged, or holds more than tensors, which could be code",
            where=str(file),
            hint="download it again, or get the model's safetensors files",
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"it cannot be read ({reason})", str(file), DOWNLOAD_AGAIN) from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise CheckpointError("it is not a table of tensors", str(file), DOWNLOAD_AGAIN)
    return tensors


def _load(file: Path) -> Any:
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    try:
        return torch.load(file, mmap=True, **options)
    except RuntimeError:
        # files of before torch 1.6 cannot be mapped
        return torch.load(file, **options)
