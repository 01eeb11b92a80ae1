"""Where weights come from and go to: checkpoints as lazy sources of tensors, and saving."""

from __future__ import annotations

from reroll.rewrite.checkpoint.contents import fit_to_checkpoint
from reroll.rewrite.checkpoint.gguf_source import GgufSource
from reroll.rewrite.checkpoint.hf_source import hf_source
from reroll.rewrite.checkpoint.safetensors_files import SafetensorsSource, save_tensors, write_file
from reroll.rewrite.ir.weights.expressions import TensorSource
from reroll.rewrite.ir.weights.sources import ChainSource, MemorySource, missing_tensor

__all__ = [
    "ChainSource",
    "GgufSource",
    "MemorySource",
    "SafetensorsSource",
    "TensorSource",
    "fit_to_checkpoint",
    "hf_source",
    "missing_tensor",
    "save_tensors",
    "write_file",
]
