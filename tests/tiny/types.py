"""Tiny random instances of every model type that the installed transformers knows."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
import transformers
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.tiny.configs import TEXT_IDS, nested_classes, tiny_config

Kind = Literal["causal", "encoder"]

# how far each parameter moves from its initial value: enough that every layer changes the logits
NOISE = 0.08

_DRAFTS = "has no keys and values of its own: drafts from the cache of a target model"
# types that no tiny configuration can make run by itself, and why
UNSUPPORTED: dict[str, str] = {
    "gemma3n": "the vision tower is a timm model, and timm is not a dependency",
    "gemma4_assistant": _DRAFTS,
    "gemma4_unified_assistant": _DRAFTS,
}

# encoders, vision towers and encoder-decoders, built with AutoModel
ENCODER_TYPES: list[str] = [
    "bert", "roberta", "electra", "distilbert", "modernbert", "mpnet", "nomic_bert", "xlm-roberta",
    "albert", "camembert", "ernie", "deberta", "deberta-v2", "eurobert", "esm", "gte", "roformer",
    "jina_embeddings_v3", "layoutlm", "splinter", "squeezebert", "mobilebert", "longformer",
    "nystromformer", "fnet", "convbert", "ibert", "luke", "funnel", "mra", "yoso", "canine",
    "vit", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit", "beit", "clip_vision_model",
    "siglip_vision_model", "aimv2_vision_model", "data2vec-vision", "ijepa", "vit_msn",
    "yolos", "pixio", "radio", "mlcd_vision_model", "hiera", "swin", "swinv2",
    "clip_text_model", "siglip_text_model", "clip", "siglip",
    "t5", "mt5", "umt5", "bart", "mbart", "pegasus", "marian", "m2m_100", "led", "longt5",
    "blenderbot", "prophetnet", "switch_transformers", "t5gemma", "fsmt",
    "whisper", "wav2vec2", "hubert", "wavlm", "moonshine", "speech_to_text",
    "audio-spectrogram-transformer",
]  # fmt: skip


def causal_types() -> list[str]:
    """Model types that have a causal language model in the installed transformers."""
    # reroll registers a type of its own, which has no model to build
    return [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name != "reroll"]


def encoder_types() -> list[str]:
    """Encoders, vision towers and encoder-decoders that the benchmarks cover."""
    return [model_type for model_type in ENCODER_TYPES if model_type in CONFIG_MAPPING]


def kind_of(model_type: str) -> Kind:
    """The kind that `build` picks by default: causal where the type has a causal model."""
    return "causal" if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else "encoder"


def build(model_type: str, seed: int = 0, kind: Kind | None = None) -> PreTrainedModel:
    """A tiny random model in fp32, in eval mode, with eager attention.

    Every parameter is moved away from its initial value, so that no norm, bias or gate is neutral.
    """
    if model_type in UNSUPPORTED:
        raise ValueError(f"cannot build {model_type}: {UNSUPPORTED[model_type]}")
    kind = kind or kind_of(model_type)
    auto = AutoModelForCausalLM if kind == "causal" else AutoModel
    config = tiny_config(model_type, decoder=kind == "causal")
    model_class = _model_class(auto, config)
    config = _part_of_class(config, model_class.config_class)
    torch.manual_seed(seed)
    model = model_class._from_config(
        config, attn_implementation="eager", dtype=torch.float32
    ).eval()
    perturb(model, seed)
    return model


def example_inputs(
    model: PreTrainedModel, batch: int, length: int, seed: int = 0
) -> dict[str, Tensor]:
    """Keyword inputs for the forward of `model`: text with one left-padded row, pixels or audio."""
    generator = torch.Generator().manual_seed(seed)
    accepted = inspect.signature(model.forward).parameters
    main = model.main_input_name
    config = model.config
    if main == "pixel_values":
        inputs = {"pixel_values": _pixels(config, batch, generator)}
    elif main in ("input_features", "input_values"):
        inputs = {main: _audio(config, main, batch, generator)}
    else:
        inputs = _text(config, batch, length, generator)
        if hasattr(model, "lm_heads"):  # one stream of ids per codebook, flattened into the batch
            inputs["input_ids"] = _ids(config, batch * config.num_codebooks, length, generator)
    if "pixel_values" in accepted and _is_dual(config) and not model.can_generate():
        inputs["pixel_values"] = _pixels(config.vision_config, batch, generator)
    if config.is_encoder_decoder and "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = _ids(config, batch, length // 2, generator)
    return {name: value for name, value in inputs.items() if name in accepted}


def valid_outputs(output: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """The rows of `output` [batch, time, ...] that mean something: those of no padded position."""
    if "attention_mask" not in inputs or "decoder_input_ids" in inputs:
        return output
    mask = inputs["attention_mask"].bool()
    if output.shape[:2] == mask.shape:
        return output[mask]
    if output.ndim < 3:  # one row per text, not per token
        return output
    # several output rows per text where each codebook has its own
    streams = output.shape[0] // mask.shape[0]
    return output[mask.repeat_interleave(streams, dim=0)]


def run_eager(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """Logits, or the last hidden state where the model has no head."""
    accepted = inspect.signature(model.forward).parameters
    options = {"use_cache": False} if {"use_cache", "kwargs"} & set(accepted) else {}
    with torch.no_grad():
        return primary_output(model(**inputs, **options))


def primary_output(output: Any) -> Tensor:
    """The tensor of a model output that the benchmarks compare."""
    for name in ("logits", "last_hidden_state", "logits_per_image"):
        if isinstance(value := getattr(output, name, None), Tensor):
            return value
    raise TypeError(f"no logits or hidden state in {type(output).__name__}")


def token_mixing(model: PreTrainedModel) -> str:
    """`attention`, `recurrent`, or `hybrid` where layers of both kinds or both in one stand."""
    config = model.config.get_text_config()
    fields = ("layer_types", "layers_block_type", "block_types")
    kinds = set(next((kinds for name in fields if (kinds := getattr(config, name, None))), ()))
    recurrent = {kind for kind in kinds if re.search("linear|mamba|recurrent|conv", kind)}
    if not recurrent and not getattr(model, "_is_stateful", False):
        return "hybrid" if any("hybrid" in kind for kind in kinds) else "attention"
    return "recurrent" if kinds == recurrent else "hybrid"


def layer_count(model: PreTrainedModel) -> int:
    """Layers of all stacks that the forward runs; 0 where no field of the configuration says."""
    config = model.config
    if config.is_encoder_decoder:
        for names in (("encoder_layers", "decoder_layers"), ("num_layers", "num_decoder_layers")):
            if all(hasattr(config, name) for name in names):
                return sum(int(getattr(config, name)) for name in names)
    if _is_dual(config) and not model.can_generate():
        return sum(_layers_of(part) for part in (config.text_config, config.vision_config))
    return _layers_of(config.get_text_config(decoder=True))


def _layers_of(config: PreTrainedConfig) -> int:
    parts = [config] + [getattr(config, name) for name in nested_classes(type(config))]
    names = ("num_hidden_layers", "decoder_layers", "num_layers", "depth")
    found = (getattr(part, name, None) for part in parts for name in names)
    return next((count for count in found if isinstance(count, int)), 0)


def _ids(config: PreTrainedConfig, batch: int, length: int, generator: torch.Generator) -> Tensor:
    return torch.randint(TEXT_IDS.start, TEXT_IDS.stop, (batch, length), generator=generator)


def _text(
    config: PreTrainedConfig, batch: int, length: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Token ids [batch, time] and their mask, the first row padded on the left by a quarter."""
    ids = _ids(config, batch, length, generator)
    mask = torch.ones_like(ids)
    if batch > 1:
        padded = length // 4
        mask[0, :padded] = 0
        ids[0, :padded] = getattr(config.get_text_config(), "pad_token_id", None) or 0
    return {"input_ids": ids, "attention_mask": mask}


def _pixels(config: PreTrainedConfig, batch: int, generator: torch.Generator) -> Tensor:
    """Images [batch, channels, height, width]."""
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(
        batch, getattr(config, "num_channels", 3), height, width, generator=generator
    )


def _audio(config: PreTrainedConfig, name: str, batch: int, generator: torch.Generator) -> Tensor:
    """Waveforms [batch, samples] or log-mel features [batch, mels, frames]."""
    if frame_size := getattr(config, "input_feat_per_channel", None):
        return torch.randn(batch, 64, frame_size, generator=generator)
    mels = getattr(config, "num_mel_bins", None)
    if mels is None:
        return torch.randn(batch, 1600, generator=generator)
    if hasattr(config, "max_source_positions") and name == "input_features":
        return torch.randn(batch, mels, 2 * config.max_source_positions, generator=generator)
    return torch.randn(batch, config.max_length, mels, generator=generator)


def _is_dual(config: PreTrainedConfig) -> bool:
    """Whether text and image towers stand beside each other, so that both inputs are needed."""
    return hasattr(config, "text_config") and hasattr(config, "vision_config")


def _model_class(
    auto: type[AutoModel] | type[AutoModelForCausalLM], config: PreTrainedConfig
) -> type[PreTrainedModel]:
    """The class that an auto class builds from `config`, or the model named like its config."""
    found: Any
    if type(config) in auto._model_mapping:
        found = auto._model_mapping[type(config)]
    else:
        found = getattr(transformers, type(config).__name__.removesuffix("Config") + "Model")
    chosen: type[PreTrainedModel] = found[0] if isinstance(found, tuple) else found
    return chosen


def _part_of_class(
    config: PreTrainedConfig, part_class: type[PreTrainedConfig]
) -> PreTrainedConfig:
    """The nested configuration that the causal model of a composite type is built from."""
    parts = (getattr(config, name) for name in nested_classes(type(config)))
    return next((part for part in parts if isinstance(part, part_class)), config)


def perturb(model: PreTrainedModel, seed: int) -> None:
    """Add noise to every parameter, and to every routing bias that starts at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter.nan_to_num() + NOISE * noise)
        for name, buffer in model.named_buffers():
            if name.endswith("bias") and buffer.is_floating_point() and not buffer.any():
                buffer.add_(NOISE * torch.randn(buffer.shape, generator=generator))
