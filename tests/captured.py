"""Tiny random transformers models and their Programs, captured once in a test run.

The processes of a run read from one folder what one of them has captured.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

from reroll.rewrite.capture.export import capture
from reroll.rewrite.capture.raising import raise_idioms
from reroll.rewrite.capture.rolling import roll_loops
from reroll.rewrite.ir.program import Program

TEXT = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
# a folder of this run alone; set by conftest.py where the run has several processes
shared: Path | None = None

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def llama(**changes: Any) -> Any:
    options = {"intermediate_size": 48, "num_key_value_heads": 2, "tie_word_embeddings": True}
    config = transformers.LlamaConfig(**{**TEXT, **SPECIAL, **options, **changes})
    return transformers.LlamaForCausalLM(config)


def qwen2() -> Any:
    config = transformers.Qwen2Config(
        **TEXT, **SPECIAL, intermediate_size=48, num_key_value_heads=2
    )
    return transformers.Qwen2ForCausalLM(config)


def gemma3() -> Any:
    config = transformers.Gemma3TextConfig(
        **TEXT, **SPECIAL, intermediate_size=48, num_key_value_heads=2, head_dim=8,
        sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    return transformers.Gemma3ForCausalLM(config)


def smollm3() -> Any:
    # every fourth layer goes without rotary embedding
    config = transformers.SmolLM3Config(
        **{**TEXT, "num_hidden_layers": 12}, **SPECIAL, intermediate_size=48, num_key_value_heads=2
    )
    return transformers.SmolLM3ForCausalLM(config)


def gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=4, n_head=4, n_positions=64, **SPECIAL
    )
    return transformers.GPT2LMHeadModel(config)


def gpt_neox() -> Any:
    config = transformers.GPTNeoXConfig(**TEXT, **SPECIAL, intermediate_size=64)
    return transformers.GPTNeoXForCausalLM(config)


def bloom() -> Any:
    config = transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=4, n_head=4, **SPECIAL)
    return transformers.BloomForCausalLM(config)


def lfm2() -> Any:
    # its convolutions keep their last inputs
    config = transformers.Lfm2Config(
        **TEXT, **SPECIAL, intermediate_size=48, num_key_value_heads=2,
        layer_types=["conv", "full_attention", "conv", "conv"],
        block_auto_adjust_ff_dim=False,
    )  # fmt: skip
    return transformers.Lfm2ForCausalLM(config)


def indexer() -> Any:
    # reads the four keys that score best by keys of another kind, which have a cache of their own
    config = transformers.DeepseekV32Config(
        **{**TEXT, "num_hidden_layers": 2}, **SPECIAL, intermediate_size=48,
        num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=8, index_topk=4, index_head_dim=16, index_n_heads=2,
        mlp_layer_types=["dense"] * 2,
    )  # fmt: skip
    return transformers.DeepseekV32ForCausalLM(config)


def bert() -> Any:
    return transformers.BertModel(transformers.BertConfig(**TEXT, intermediate_size=64))


def xlm_roberta() -> Any:
    # positions count from behind the padding token
    config = transformers.XLMRobertaConfig(
        **TEXT, intermediate_size=64, pad_token_id=1, max_position_embeddings=64, type_vocab_size=1
    )
    return transformers.XLMRobertaModel(config)


def roberta_decoder() -> Any:
    config = transformers.RobertaConfig(
        **TEXT, intermediate_size=64, pad_token_id=1, max_position_embeddings=64, is_decoder=True
    )
    return transformers.RobertaForCausalLM(config)


def opt() -> Any:
    # positions are counted from the padding mask
    config = transformers.OPTConfig(
        **TEXT, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64, pad_token_id=1
    )
    return transformers.OPTForCausalLM(config)


def bart() -> Any:
    config = transformers.BartConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, pad_token_id=1,
        bos_token_id=0, eos_token_id=2, decoder_start_token_id=2, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.BartModel(config)


def dinov2() -> Any:
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, image_size=28, patch_size=14
    )
    return transformers.Dinov2Model(config)


def vit() -> Any:
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        image_size=16, patch_size=4,
    )  # fmt: skip
    return transformers.ViTModel(config)


def t5() -> Any:
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4,
        decoder_start_token_id=1, **SPECIAL,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def whisper() -> Any:
    config = transformers.WhisperConfig(
        vocab_size=64, d_model=32, encoder_layers=3, decoder_layers=3, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64,
        max_source_positions=50, decoder_start_token_id=1, **SPECIAL,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


MODELS: dict[str, Callable[[], Any]] = {
    f.__name__: f
    for f in (
        llama, qwen2, gemma3, smollm3, gpt2, gpt_neox, bloom, lfm2, indexer, opt, roberta_decoder,
        bert, xlm_roberta, bart, dinov2, vit, t5, whisper,
    )
}  # fmt: skip


@cache
def model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A random model; the vectors, which start as zeros and ones, are random as well."""
    torch.manual_seed(0)
    made = MODELS[name]()
    for path, parameter in made.named_parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
        # T5 does not scale its scores: large queries would make rounding large as well
        elif not path.endswith("Attention.q.weight"):
            parameter.data *= 4
    return made.to(dtype).eval()


@cache
def captured(name: str, dtype: torch.dtype = torch.float32) -> Program:
    """The Program of `model(name)`, with its layers rolled."""
    # what `capture` does, without capturing once more
    return roll_loops(raise_idioms(flat(name, dtype)))


@cache
def flat(name: str, dtype: torch.dtype = torch.float32) -> Program:
    """The Program of `model(name)` without loops."""
    if shared is None:
        return capture(model(name, dtype), roll=False)
    file = shared / f"{name}-{str(dtype).removeprefix('torch.')}.pt"
    if not file.exists():
        write(capture(model(name, dtype), roll=False), file)
    return read(file)


def write(program: Program, file: Path) -> None:
    """Keep a Program, its tensors and its side files in one file, which appears whole."""
    appear(pickle.dumps(program), file)


def appear(data: bytes, file: Path) -> None:
    """Write a file for the other processes of a run."""
    # two processes may capture the same model: the file appears whole, twice
    part = file.with_suffix(f".{os.getpid()}")
    part.write_bytes(data)
    part.replace(file)


def read(file: Path) -> Program:
    """The Program in a file of `write`."""
    program: Program = pickle.loads(file.read_bytes())
    return program
