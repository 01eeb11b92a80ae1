"""What tests on real models ask of their directories."""

from __future__ import annotations

import json
from pathlib import Path

import torch


def stored_dtype(path: Path) -> torch.dtype:
    """The dtype of a checkpoint; fp32 where its configuration names none."""
    config = json.loads((path / "config.json").read_text())
    named = config.get("dtype") or config.get("torch_dtype") or "float32"
    dtype: torch.dtype = getattr(torch, named)
    return dtype
