"""Tiny configurations of every model type that the installed transformers knows.

A configuration is shrunk by rules on the *names* of its fields, which hold over all families; the
few facts that no rule can know stand in `OVERRIDES`. Only fields that the configuration class
declares with a default of their own are set, so that everything a class derives from them
(per-layer lists, head sizes, rope parameters) is derived again for the small size.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Sequence
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

VOCABULARY = 256
# special tokens live above the ids that random texts are drawn from, or at a default below them
TEXT_IDS = range(10, 200)
MIN_LAYERS, MAX_LAYERS = 4, 16

# field name -> largest value. The first match wins, and a smaller default is kept.
SIZE_RULES: list[tuple[re.Pattern[str], int]] = [
    (re.compile(pattern), size)
    for pattern, size in [
        (r".*vocab_size.*|.*_vocab|vocab_offset|codebook_size", VOCABULARY),
        (r".*(max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length)", 512),
        (r"max_(source|target)_positions|position_embedding_size|num_position_embeddings", 512),
        (r"first_k_dense_replace|num_dense_layers", 1),
        (r"max_window_layers|num_global_layers|conf_num_hidden_layers", 2),
        (r"num_kv_shared_layers", 5),
        (r".*(sliding_window(_size)?|window_size|local_attention|attention_window_len)", 8),
        (r".*chunk_size|.*chunk_length|block_size|index_block_size|.*index_topk", 8),
        (r".*(key_value_heads|kv_heads|kv_n_heads)|linear_num_key_heads", 2),
        (r"n_mamba_heads|mamba_n_heads|mamba_num_heads", 8),
        (r".*(attention_heads|num_heads|n_heads?|num_value_heads)", 4),
        (r".*(head_dim|dim_head|head_size|d_head|kv_channels)", 16),
        (r"query_pre_attn_scalar|rotary_dim", 16),
        (r".*(local|routed|num|n)_experts|zero_expert_num", 4),
        (r".*(experts_per_tok|experts_per_token|topk|top_k|moe_k)", 2),
        (r"n_groups?|num_expert_group|topk_group|mamba_n_?groups|o_groups", 2),
        (r".*_rank|hc_lowrank|.*d_state|.*state_size", 16),
        (r"image_size|crop_size", 32),
        (r"patch_size", 8),
        (r".*(intermediate_size.*|ffn_dim|ffn_hidden_size|dff|dim_ff|d_inner|d_ff|mlp_dim)", 128),
        (r"feed_forward_size|hidden_dim|mamba_d_ssm", 128),
        (r".*(hidden_size.*|d_model|n_embd|embed_dim|emb_dim|embedding_size)|dim", 64),
        (r".*(out_dim|in_dim|input_size|output_dim|input_dim|proj_dims?)", 64),
    ]
]
TOKEN_ID = re.compile(r".*token_id|.*token_index|(unk|mask)_index")
LAYER_COUNT = re.compile(
    r"(num|n)?_?(hidden|encoder|decoder)?_?layers?|num_blocks|depth|num_layers_per_stack"
)

_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}

# what the rules cannot know, by model type
OVERRIDES: dict[str, dict[str, Any]] = {
    # types whose defaults name no experts, adapters, or layer kinds at all
    "cohere_compass_text": {
        "num_hidden_layers": 8,
        "layer_types": [*["sliding_attention"] * 3, "full_attention"] * 2,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": None,
        },
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "max_window_layers": 2,
    },
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]]},
    "bamba": {"num_hidden_layers": 6, "attn_layer_indices": [2, 5]},
    "granitemoehybrid": {
        "num_hidden_layers": 6,
        "layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2,
    },
    "nemotron_h": {
        "num_hidden_layers": 8,
        "layer_types": ["linear_attention", "moe", "full_attention", "mlp"] * 2,
    },
    "lfm2": {"num_hidden_layers": 6, "layer_types": ["conv", "conv", "full_attention"] * 2},
    "lfm2_moe": {"num_hidden_layers": 6, "layer_types": ["conv", "conv", "full_attention"] * 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba2": {
        "num_hidden_layers": 6,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2,
    },
    # two periods of local and global layers, and a third that reuses their keys and values
    "gemma3n_text": {
        "num_hidden_layers": 15,
        "num_kv_shared_layers": 5,
        "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 5,
    },
    # its sparse attention is another computation above a length than below, which is refused
    "big_bird": {"attention_type": "original_full"},
    # sizes that must agree with each other
    "gemma4_text": {"global_head_dim": 32},
    "gemma4_unified_text": {"global_head_dim": 32},
    "gemma3": {"mm_tokens_per_image": 4},
    "llama4.vision_config": {"intermediate_size": 256},
    "paligemma": {"projection_dim": 64},
    "paligemma.vision_config": {"projection_dim": 64},
    "mamba2": {"num_heads": 8},
    "swin": {"embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
    "swinv2": {"embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
    "esm": {"pad_token_id": 1, "mask_token_id": 2},
    "reformer": {"axial_pos_embds_dim": (32, 32), "axial_pos_shape": (16, 32), "hash_seed": 0},
    "dots3_note_text": {
        "sliding_window": 8,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 32,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "dots3_note_vision_encoder": {"pyramid_num_routed": [-1, -1, 4, 4], "num_hidden_layers": 4},
    "audio-spectrogram-transformer": {"max_length": 64},
    "yolos": {"num_detection_tokens": 8},
    # three parts of half a head of 16
    "qwen2_vl.text_config": {"rope_parameters": _MROPE},
    "qwen2_5_vl.text_config": {"rope_parameters": _MROPE},
    # fields that the modelling file reads and the configuration class does not declare
    "dbrx.attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0},
}


def tiny_config(model_type: str, decoder: bool) -> PreTrainedConfig:
    """The configuration of `model_type`, shrunk; `decoder` makes an encoder's attention causal."""
    config_class = CONFIG_MAPPING[model_type]
    values = _shrunk_fields(config_class, model_type)
    if decoder and "is_decoder" in _declared_defaults(config_class):
        values["is_decoder"] = True
    return config_class(**values)


def _shrunk_fields(config_class: type[PreTrainedConfig], path: str) -> dict[str, Any]:
    """Constructor arguments for a small instance of a configuration class.

    `path` is the model type, or for a nested configuration the path of fields that leads to it.
    """
    overrides = OVERRIDES.get(config_class.model_type, {}) | OVERRIDES.get(path, {})
    defaults = _declared_defaults(config_class)
    vocabulary = min(defaults.get("vocab_size") or VOCABULARY, VOCABULARY)
    special_ids = iter(range(vocabulary - 1, 0, -1))
    values: dict[str, Any] = {}
    for name, default in defaults.items():
        if name in ("vocab_size", "image_size") and not isinstance(default, int):
            values[name] = VOCABULARY if name == "vocab_size" else (32, 32)
        elif isinstance(default, bool) or not isinstance(default, int):
            continue
        elif TOKEN_ID.fullmatch(name):
            values[name] = default if default < TEXT_IDS.start else next(special_ids)
        else:
            sizes = (size for pattern, size in SIZE_RULES if pattern.fullmatch(name))
            values[name] = min(default, next(sizes, default))
    for name, nested in nested_classes(config_class).items():
        values[name] = nested(**_shrunk_fields(nested, f"{path}.{name}"))
        for extra, value in OVERRIDES.get(f"{path}.{name}", {}).items():
            setattr(values[name], extra, value)
    if "head_dim" in defaults and "num_attention_heads" in defaults:
        values["head_dim"] = 16
    if "num_key_value_heads" in defaults and "num_attention_heads" in defaults:
        # latent attention has one key and value head per query head
        values["num_key_value_heads"] = (
            values["num_attention_heads"] if "kv_lora_rank" in defaults else 2
        )
    values |= overrides
    layer_fields = [
        name for name in values if LAYER_COUNT.fullmatch(name) and name not in overrides
    ]
    if layer_fields:
        values |= dict.fromkeys(layer_fields, 3 * MAX_LAYERS)
        count = _layers_to_show_repetition(config_class(**values))
        values |= dict.fromkeys(layer_fields, count)
    return values


def _declared_defaults(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """Defaults of the fields that a configuration class adds to the common ones."""
    common = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    defaults = {}
    for field in dataclasses.fields(config_class):
        if field.name in common:
            continue
        if field.default is not dataclasses.MISSING:
            defaults[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            defaults[field.name] = field.default_factory()
    return defaults


def nested_classes(config_class: type[PreTrainedConfig]) -> dict[str, type[PreTrainedConfig]]:
    """Configuration classes of the parts of a composite configuration, by field."""
    parts = {
        name: type(spec.default_config)
        for name, spec in config_class.sub_configs_defaults.items()
        if hasattr(spec, "default_config")
    }
    plain = {
        name: part for name, part in config_class.sub_configs.items() if part is not AutoConfig
    }
    return plain | parts


def _layers_to_show_repetition(config: PreTrainedConfig) -> int:
    """Layers that hold the prefix and two periods of the per-layer patterns of a deep `config`."""
    patterns = [pattern for pattern in _per_layer_lists(config) if _periodic_after(pattern)]
    if not patterns:
        return MIN_LAYERS
    rows = list(zip(*patterns, strict=True))
    return max(MIN_LAYERS, _periodic_after(rows) or max(map(_periodic_after, patterns)))


def _periodic_after(rows: Sequence[Any]) -> int:
    """Rows up to the end of the second period, 0 where they do not repeat soon enough."""
    rows = rows[:-1]  # the last layer may be forced to be special
    for count in range(2, MAX_LAYERS + 1):
        for period in range(1, count // 2 + 1):
            start = count - 2 * period
            if all(rows[i] == rows[i + period] for i in range(start, len(rows) - period)):
                return count
    return 0


def _per_layer_lists(config: PreTrainedConfig) -> list[Sequence[Any]]:
    """Attributes and properties of `config` with one entry per layer."""
    layers = 3 * MAX_LAYERS
    names = set(vars(config))
    names |= {
        name for name, _ in inspect.getmembers(type(config), lambda m: isinstance(m, property))
    }
    found: list[Sequence[Any]] = []
    for name in sorted(names):
        try:
            value = getattr(config, name)
        except Exception:  # a property that does not apply to this configuration
            continue
        if isinstance(value, list | tuple) and len(value) == layers:
            found.append(value)
    return found
