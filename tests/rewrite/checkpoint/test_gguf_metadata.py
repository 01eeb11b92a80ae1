"""Metadata of GGUF files that changes what a model computes: honoured, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.integrations import GGUF_CONFIG_MAPPING

import reroll
from reroll.errors import CheckpointError
from reroll.rewrite.checkpoint.gguf_file import GgufFile
from reroll.rewrite.checkpoint.gguf_metadata import _is_held, check_metadata
from tests.rewrite.checkpoint.gguf_files import write_gguf

REFUSED = [
    ("llama.rope.scaling.type", "yarn"),
    ("llama.rope.scaling.type", "linear"),
    ("llama.rope.scaling.factor", 4.0),
    ("llama.rope.scale_linear", 4.0),
    ("llama.rope.scaling.attn_factor", 1.19),
    ("llama.rope.scaling.yarn_log_multiplier", 0.1),
    ("llama.rope.scaling.yarn_beta_fast", 16.0),
    ("llama.rope.dimension_sections", [2, 2, 0, 0]),
    ("llama.rope.freq_base_swa", 5e5),
    ("llama.attention.sliding_window", 16),
    ("llama.attention.sliding_window_pattern", [True, False]),
    ("llama.attention.scale", 0.25),
    ("llama.attention.key_length", 16),
    ("llama.attention.value_length", 16),
    ("llama.attention.clamp_kqv", 8.0),
    ("llama.attention.max_alibi_bias", 8.0),
    ("llama.attention.temperature_scale", 0.1),
    ("llama.attention.temperature_length", 8192),
    ("llama.attention.causal", False),
    ("llama.attn_logit_softcapping", 50.0),
    ("llama.final_logit_softcapping", 30.0),
    ("llama.logit_scale", 0.0625),
    ("llama.embedding_scale", 12.0),
    ("llama.residual_scale", 0.22),
    ("llama.expert_count", 8),
    ("llama.expert_weights_scale", 2.5),
    ("llama.expert_weights_norm", True),
    ("llama.expert_gating_func", 2),
    ("llama.swiglu_clamp_exp", [7.0, 7.0]),
    ("llama.something_new", 1),
    ("diffusion.shift_logits", True),
]
HONOURED = {
    "llama.rope.freq_base": 500000.0,
    "llama.rope.dimension_count": 8,
    "llama.rope.scaling.type": "none",
    "llama.rope.scaling.factor": 1.0,
    "llama.rope.scaling.original_context_length": 32,
    "llama.attention.key_length": 8,
    "llama.attention.value_length": 8,
    "llama.attention.scale": 8**-0.5,
    "llama.attention.sliding_window": 0,
    "llama.logit_scale": 1.0,
    "llama.expert_count": 0,
    "llama.tensor_data_layout": "Meta AI original pth",
    "llama.vision.block_count": 12,
    "general.name": "a model",
    "someone.quantised_it": "yes",
}


@pytest.mark.parametrize(("key", "value"), REFUSED, ids=lambda v: str(v))
def test_what_is_not_honoured_is_refused_by_name(tmp_path: Path, key: str, value: Any) -> None:
    write_gguf(tmp_path / "m.gguf", fields={key: value})
    with pytest.raises(CheckpointError) as error:
        reroll.capture(str(tmp_path / "m.gguf"))
    assert key in error.value.message
    assert "m.gguf" in str(error.value.where)
    assert "safetensors" in str(error.value.hint)


def test_what_is_honoured_is_computed(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", fields=HONOURED)
    write_gguf(tmp_path / "other.gguf")
    ids = torch.arange(12)[None]
    logits = [
        reroll.capture(str(tmp_path / name)).to_module()(ids).logits
        for name in ("m.gguf", "other.gguf")
    ]
    original = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf")
    torch.testing.assert_close(logits[0], original.eval()(ids).logits)
    # the base of the frequencies is another
    assert not torch.allclose(logits[0], logits[1])


@pytest.mark.parametrize(
    "name", ["rope_freqs.weight", "rope_factors_long.weight", "blk.0.attn_q.bias"]
)
def test_a_tensor_without_a_place_is_refused_by_name(tmp_path: Path, name: str) -> None:
    write_gguf(tmp_path / "m.gguf", tensors={name: torch.linspace(1, 8, 4)})
    with pytest.raises(CheckpointError, match=name):
        reroll.capture(str(tmp_path / "m.gguf"))


def test_tensors_that_change_nothing_are_passed_over(tmp_path: Path) -> None:
    write_gguf(
        tmp_path / "m.gguf", tensors={"rope_freqs.weight": torch.ones(4), "v.patch": torch.ones(4)}
    )
    assert reroll.capture(str(tmp_path / "m.gguf")).loops


def test_other_types_honour_what_their_configurations_say(tmp_path: Path) -> None:
    """Soft caps, windows and scales that a configuration has are compared with it, not refused."""
    config = transformers.Gemma2Config(num_hidden_layers=4)
    fields = {
        "attention.sliding_window": 4096,
        "attention.value_length": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "attention.sliding_window_pattern": 2,
    }
    file = _File("gemma2", fields)
    check_metadata(file, config)
    config.final_logit_softcapping = 15.0
    with pytest.raises(CheckpointError, match=r"gemma2\.final_logit_softcapping = 30"):
        check_metadata(file, config)


def test_a_key_that_transformers_reads_for_nothing_is_not_honoured() -> None:
    """StarCoder 2 and StableLM: transformers does not read the base of their frequencies."""
    assert "rope.freq_base" not in GGUF_CONFIG_MAPPING["starcoder2"]
    config = transformers.Starcoder2Config()
    with pytest.raises(CheckpointError, match=r"starcoder2\.rope\.freq_base = 999999"):
        check_metadata(_File("starcoder2", {"rope.freq_base": 999999.0}), config)
    assert not _is_held(config, "no_such_attribute", 1)


class _File(GgufFile):
    """A file of which only the metadata is there."""

    def __init__(self, architecture: str, fields: dict[str, Any]) -> None:
        self.path = Path("m.gguf")
        self.fields = {"general.architecture": architecture}
        self.fields |= {f"{architecture}.{key}": value for key, value in fields.items()}
