"""The kinds of model that transformers' tests run on, their testers, and every flag and override.

A tester has the attributes and methods that the common tests read: sizes, a configuration, and
inputs. A kind is an original, and the passes that its lowered models go through.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig

from tests import tiny

BATCH, LENGTH, FRAMES, LAYERS, HEADS, WIDTH = 3, 7, 60, 2, 4, 32
TOKENS: dict[str, Any] = {
    "vocab_size": tiny.WORDS, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
TEXT = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
PAIR = {
    "d_model": WIDTH, "encoder_layers": LAYERS, "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "encoder_ffn_dim": 37,
    "decoder_ffn_dim": 37, "decoder_start_token_id": 0,
}  # fmt: skip


def _ids(rows: int = BATCH, length: int = LENGTH) -> torch.Tensor:
    # no token that ends or pads a text
    return torch.randint(3, tiny.WORDS, (rows, length))


def _text() -> dict[str, torch.Tensor]:
    # rows of growing length, padded on the right, as transformers' testers have them
    return {"input_ids": _ids(), "attention_mask": torch.ones(BATCH, LENGTH).tril().long()}


def _text_pair() -> dict[str, torch.Tensor]:
    return {
        **_text(),
        "decoder_input_ids": _ids(),
        "decoder_attention_mask": torch.ones_like(_ids()),
    }


def _speech() -> dict[str, torch.Tensor]:
    return {"input_features": torch.randn(BATCH, 80, FRAMES), "decoder_input_ids": _ids()}


@dataclass(frozen=True)
class Original:
    """A model of transformers: its class, a tiny configuration, and inputs of a forward."""

    name: str
    config: Callable[[], PreTrainedConfig]
    inputs: Callable[[], dict[str, torch.Tensor]] = _text

    @property
    def model_class(self) -> Any:
        return getattr(transformers, self.name)


LLAMA = Original(
    "LlamaForCausalLM",
    lambda: transformers.LlamaConfig(
        **TOKENS, **TEXT, intermediate_size=37, num_key_value_heads=2, max_position_embeddings=512
    ),
)
GEMMA = Original(
    "Gemma3ForCausalLM",
    lambda: transformers.Gemma3TextConfig(
        **TOKENS, **TEXT, intermediate_size=37, num_key_value_heads=2, head_dim=8,
        sliding_window=4, layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=512,
    ),
)  # fmt: skip
GPT2 = Original(
    "GPT2LMHeadModel",
    lambda: transformers.GPT2Config(
        **TOKENS, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=512
    ),
)
BLOOM = Original(
    "BloomForCausalLM",
    lambda: transformers.BloomConfig(**TOKENS, hidden_size=WIDTH, n_layer=LAYERS, n_head=HEADS),
)
BART = Original(
    "BartForConditionalGeneration",
    lambda: transformers.BartConfig(**TOKENS, **PAIR, max_position_embeddings=512),
    _text_pair,
)
T5 = Original(
    "T5ForConditionalGeneration",
    lambda: transformers.T5Config(
        **TOKENS, d_model=WIDTH, d_kv=8, d_ff=37, num_layers=LAYERS, num_heads=HEADS,
        decoder_start_token_id=0,
    ),
    _text_pair,
)  # fmt: skip
WHISPER = Original(
    "WhisperForConditionalGeneration",
    lambda: transformers.WhisperConfig(
        **TOKENS, **PAIR, max_source_positions=FRAMES // 2, max_target_positions=512,
        suppress_tokens=None, begin_suppress_tokens=None,
    ),
    _speech,
)  # fmt: skip


class Tester:
    """What the common tests call a model tester."""

    batch_size, seq_length = BATCH, LENGTH
    num_hidden_layers, num_attention_heads, hidden_size = LAYERS, HEADS, WIDTH
    is_training = True

    def __init__(self, original: Original) -> None:
        self.original = original
        if original is WHISPER:
            # its convolutions make one state of two frames
            self.encoder_seq_length = self.key_length = FRAMES // 2
            self.decoder_seq_length = LENGTH

    def get_config(self) -> PreTrainedConfig:
        return self.original.config()

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, Any]]:
        return self.get_config(), self.original.inputs()

    prepare_config_and_inputs = prepare_config_and_inputs_for_common


@dataclass(frozen=True)
class Kind:
    """A kind of lowered model: an original, and passes."""

    original: Original
    passes: str = ""
    # attributes of the test case, such as `has_attentions`
    flags: dict[str, Any] = field(default_factory=dict)


SLOTS = "mixer=gsa, mixer_options={slots: 8}, gates=clustered, samples=2, combine=joint"

KINDS = {
    "llama": Kind(LLAMA),
    "gemma": Kind(GEMMA),
    "gpt2": Kind(GPT2),
    "bloom": Kind(BLOOM),
    "bart": Kind(BART),
    "t5": Kind(T5),
    "relaxed": Kind(LLAMA, "tie(blocks=1), relax(rank=4)"),
    "window": Kind(LLAMA, "window(size=4, sinks=1)"),
    # a recurrence has no attention weights
    "delta": Kind(
        LLAMA, "linearize(mixer=gated_deltanet, window=4, sinks=1)", {"has_attentions": False}
    ),
    "slots": Kind(LLAMA, f"linearize({SLOTS}, window=4, sinks=1)", {"has_attentions": False}),
    # some tokens leave at the first exit; none do
    "exits open": Kind(LLAMA, "insert_exits(at=[1], threshold=0.0005)"),
    "exits closed": Kind(LLAMA, "insert_exits(at=[1])"),
    "whisper": Kind(WHISPER),
}
