"""Where weights come from and go to: checkpoints as lazy sources of tensors, and saving."""

from __future__ import annotations

from reroll.rewrite.expressions import TensorSource
from reroll.rewrite.gguf_source import GgufSource
from reroll.rewrite.hf_source import hf_source
from reroll.rewrite.safetensors_files import SafetensorsSource, save_table, save_tensors
from reroll.rewrite.sources import ChainSource, MemorySource, missing_tensor

__all__ = [
    "ChainSource",
    "GgufSource",
    "MemorySource",
    "SafetensorsSource",
    "TensorSource",
    "hf_source",
    "missing_tensor",
    "save_table",
    "save_tensors",
]
