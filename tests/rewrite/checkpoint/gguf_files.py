"""A whole GGUF file of a tiny Llama, as transformers opens it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import torch


def write_gguf(
    file: Path,
    *,
    width: int = 32,
    layers: int = 2,
    words: int = 64,
    fields: Mapping[str, Any] | None = None,
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write one with random weights, and with more fields and tensors; it has no tokenizer."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(2 * width)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(words)
    for key, value in (fields or {}).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        add |= {str: writer.add_string, list: writer.add_array}
        add[type(value)](key, value)
    generator = torch.Generator().manual_seed(0)
    shapes = {"token_embd": (words, width), "output": (words, width), "output_norm": (width,)}
    for n in range(layers):
        parts = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (width, width))
        parts |= {"ffn_gate": (2 * width, width), "ffn_up": (2 * width, width)}
        parts |= {"ffn_down": (width, 2 * width), "attn_norm": (width,), "ffn_norm": (width,)}
        shapes |= {f"blk.{n}.{name}": shape for name, shape in parts.items()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", torch.randn(shape, generator=generator).numpy())
    for name, tensor in (tensors or {}).items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
