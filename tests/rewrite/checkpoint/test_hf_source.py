"""Checkpoints under the names that transformers models have in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from reroll.errors import CheckpointError
from reroll.rewrite.checkpoint import SafetensorsSource, hf_source
from tests.tiny import types as tiny_types

TEXT = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
IMAGE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 4,
}


def make(name: str, config: transformers.PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return getattr(transformers, name)._from_config(config)


def on_meta(name: str, config: transformers.PretrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return make(name, config)


def assert_like_transformers(directory: Path, name: str) -> None:
    """Every tensor equals what from_pretrained loads."""
    reference = getattr(transformers, name).from_pretrained(directory, dtype="auto")
    source = hf_source(directory, on_meta(name, reference.config))
    wanted = reference.state_dict()
    assert set(source.names()) == set(wanted)
    for key, tensor in wanted.items():
        loaded = source.load(key)
        assert tuple(loaded.shape) == source.meta(key).shape
        assert torch.equal(loaded.to(tensor.dtype), tensor), key


@pytest.mark.parametrize(
    ("name", "config", "renamed"),
    [
        ("LlamaForCausalLM", transformers.LlamaConfig(**TEXT), False),
        ("LlamaForCausalLM", transformers.LlamaConfig(**TEXT, tie_word_embeddings=True), False),
        ("BertModel", transformers.BertConfig(**TEXT), False),
        # experts are stored one by one, and are one tensor in memory
        ("MixtralForCausalLM", transformers.MixtralConfig(**TEXT, num_local_experts=3), True),
        ("Qwen3MoeForCausalLM", transformers.Qwen3MoeConfig(**TEXT, **EXPERTS), True),
        # attention.attention.query on disk, attention.q_proj in memory
        # one tensor on disk is split into gate, query, key and value
        ("HrmTextForCausalLM", transformers.HrmTextConfig(**TEXT, head_dim=4), True),
        ("ViTModel", transformers.ViTConfig(**IMAGE), True),
        ("Dinov2Model", transformers.Dinov2Config(**IMAGE), True),
    ],
)
def test_tiny_models(tmp_path: Path, name: str, config, renamed: bool) -> None:
    model = make(name, config)
    model.save_pretrained(tmp_path)
    on_disk = set(SafetensorsSource(tmp_path).names())
    assert renamed == bool(on_disk - set(model.state_dict()))
    assert_like_transformers(tmp_path, name)


def test_tied_head_is_found_from_either_name(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**TEXT, tie_word_embeddings=True)
    model = make("LlamaForCausalLM", config)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in SafetensorsSource(tmp_path).names()
    source = hf_source(tmp_path, on_meta("LlamaForCausalLM", config))
    assert torch.equal(source.load("lm_head.weight"), model.model.embed_tokens.weight)


@pytest.mark.parametrize(
    ("saved", "wanted"),
    [("LlamaForCausalLM", "LlamaModel"), ("LlamaModel", "LlamaForCausalLM")],
)
def test_base_model_and_model_with_a_head(tmp_path: Path, saved: str, wanted: str) -> None:
    config = transformers.LlamaConfig(**TEXT)
    model = make(saved, config)
    model.save_pretrained(tmp_path)
    source = hf_source(tmp_path, on_meta(wanted, config))
    base = model.get_decoder().state_dict()
    prefix = "model." if wanted == "LlamaForCausalLM" else ""
    for key, tensor in base.items():
        assert torch.equal(source.load(prefix + key), tensor)
    if wanted == "LlamaForCausalLM":
        assert "lm_head.weight" not in source.names()
        with pytest.raises(CheckpointError, match=r"no tensor 'lm_head.weight'"):
            source.load("lm_head.weight")


def test_split_tensors_own_their_memory(tmp_path: Path) -> None:
    config = transformers.HrmTextConfig(**TEXT, head_dim=4)
    make("HrmTextForCausalLM", config).save_pretrained(tmp_path)
    source = hf_source(tmp_path, on_meta("HrmTextForCausalLM", config))
    for name in source.names():
        tensor = source.load(name)
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        before = source.load(name)
        tensor.zero_()
        assert torch.equal(source.load(name), before)


def test_another_shape_is_refused(tmp_path: Path) -> None:
    make("LlamaModel", transformers.LlamaConfig(**TEXT)).save_pretrained(tmp_path)
    other = transformers.LlamaConfig(**{**TEXT, "intermediate_size": 48})
    with pytest.raises(CheckpointError, match=r"mlp.*but the model needs \[(48|16), "):
        hf_source(tmp_path, on_meta("LlamaModel", other))


def test_quantized_is_refused(tmp_path: Path) -> None:
    model = on_meta("LlamaModel", transformers.LlamaConfig(**TEXT))
    model.config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(CheckpointError, match="quantized"):
        hf_source(tmp_path, model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("directory", "name"),
    [
        ("smollm2-135m-instruct", "LlamaForCausalLM"),
        ("minilm-l6-v2", "BertModel"),
        ("dinov2-small", "Dinov2Model"),
        ("whisper-tiny.en", "WhisperForConditionalGeneration"),
    ],
)
def test_real_models(real_model: Callable[[str], Path], directory: str, name: str) -> None:
    assert_like_transformers(real_model(directory), name)


@pytest.mark.slow
def test_every_type_that_transformers_knows(tmp_path: Path) -> None:
    types = [("causal", t) for t in tiny_types.causal_types()]
    types += [("encoder", t) for t in tiny_types.encoder_types()]
    for kind, model_type in types:
        if model_type not in tiny_types.UNSUPPORTED:
            directory = tmp_path / kind / model_type
            model = tiny_types.build(model_type, kind=kind)
            model.save_pretrained(directory)
            assert_like_transformers(directory, type(model).__name__)
