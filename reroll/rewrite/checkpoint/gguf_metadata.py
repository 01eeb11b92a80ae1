"""Refuse a GGUF file whose metadata transformers does not fully honour.

transformers reads some keys of a GGUF file into its configuration and ignores all others. Some of
these change what the model computes: scales, soft caps, windows, scaled rotary frequencies. Here
each key of the architecture is compared with the configuration made from the file. An unknown key
counts as one that changes something.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from reroll.errors import CheckpointError
from reroll.rewrite.checkpoint.gguf_file import GgufFile

SAFETENSORS = "use the safetensors checkpoint of the model"

# sizes that also follow from shapes of tensors, and keys that do not affect the function
_WITHOUT_EFFECT = frozenset(
    "context_length embedding_length embedding_length_out feed_forward_length vocab_size "
    "expert_feed_forward_length expert_shared_feed_forward_length tensor_data_layout pooling_type "
    "nextn_predict_layers rope.scaling.finetuned rope.scaling.original_context_length".split()
)
# keys and tensors for pictures and sound, which a language model does not use
_OTHER_PARTS = ("vision.", "audio.", "mm.")
_OTHER_TENSORS = ("v.", "a.", "mm.")
# prefixes of keys that affect the model and do not begin with its architecture
_SECTIONS = ("adapter", "diffusion", "xielu")
# tensors of divisors, one for each rotary frequency
_FREQUENCY_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def check_metadata(file: GgufFile, config: Any) -> None:
    """Raise CheckpointError for a key that `config`, made from the file, does not honour."""
    for key, value in file.fields.items():
        if key.split(".")[0] in _SECTIONS:
            raise _not_honoured(file, key, value)
    architecture = f"{file.fields.get('general.architecture')}."
    read = _read_by_transformers(file, config)
    for key, value in file.fields.items():
        name = key.removeprefix(architecture)
        if name == key or name in _WITHOUT_EFFECT or name.startswith(_OTHER_PARTS):
            continue
        if (attribute := read.get(name)) is not None and _is_held(config, attribute, value):
            continue
        if name not in _ACCEPTED or not any(_same(value, a) for a in _ACCEPTED[name](config)):
            raise _not_honoured(file, key, value)


def check_tensors(file: GgufFile, unread: list[str]) -> None:
    """Raise CheckpointError for an unread tensor that affects what the model computes.

    All tensors in a GGUF file are read by its runtime, so each of them affects it. The exceptions
    are rotary factors of 1, and tensors for pictures or sound.
    """
    for name in unread:
        if name in _FREQUENCY_FACTORS and _all_ones(file.load(name)):
            continue
        if not name.startswith(_OTHER_TENSORS):
            raise CheckpointError(
                f"transformers has no place for the tensor {name!r}, which changes what the model "
                "computes",
                where=str(file.path),
                hint=SAFETENSORS,
            )


def _not_honoured(file: GgufFile, key: str, value: Any) -> CheckpointError:
    shown = "an array" if value is None or isinstance(value, tuple) else value
    return CheckpointError(
        f"its metadata says {key} = {shown}, which transformers does not honour",
        where=str(file.path),
        hint=SAFETENSORS,
    )


def _all_ones(tensor: Tensor) -> bool:
    return bool((tensor == 1).all())


def _read_by_transformers(file: GgufFile, config: Any) -> Mapping[str, str | None]:
    """Return the attribute of the configuration that transformers sets from each key."""
    from transformers.integrations import GGUF_CONFIG_MAPPING

    names = (config.model_type.removesuffix("_text"), file.fields.get("general.architecture"))
    return next((GGUF_CONFIG_MAPPING[n] for n in names if n in GGUF_CONFIG_MAPPING), {})


def _is_held(config: Any, attribute: str, value: Any) -> bool:
    if attribute == "rope_theta":
        return _same(value, _rope(config).get("rope_theta"))
    # arrays, with one number per layer, are left to transformers' own conversion
    return hasattr(config, attribute) and (
        not _is_scalar(value) or _same(value, getattr(config, attribute))
    )


def _is_scalar(value: Any) -> bool:
    return isinstance(value, bool | int | float | str)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, int | float) and isinstance(b, int | float):
        # the file holds numbers in fp32
        return math.isclose(a, b, rel_tol=1e-6)
    return bool(a == b)


# ---- the values that a configuration implies, by the key of the file


def _attribute(*names: str, neutral: tuple[Any, ...] = ()) -> Callable[[Any], Iterator[Any]]:
    """Return a function that yields a configuration's attributes, or `neutral` if it has none."""

    def accepted(config: Any) -> Iterator[Any]:
        values = [getattr(config, n) for n in names if getattr(config, n, None) is not None]
        yield from values or neutral

    return accepted


def _rope(config: Any, layer_type: str = "full_attention") -> Mapping[str, Any]:
    """Return the rotary parameters of a layer type, or those that all layers share."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return parameters.get(layer_type, parameters)  # type: ignore[no-any-return]


def _rotary(
    key: str, *neutral: Any, layer_type: str = "full_attention"
) -> Callable[[Any], Iterator[Any]]:
    def accepted(config: Any) -> Iterator[Any]:
        value = _rope(config, layer_type).get(key)
        yield from neutral if value is None else (value,)

    return accepted


def _head_dim(config: Any) -> Iterator[Any]:
    heads = getattr(config, "num_attention_heads", None)
    width = getattr(config, "head_dim", None)
    yield width if width is not None or not heads else config.hidden_size // heads
    yield getattr(config, "global_head_dim", None)


def _rotary_dims(config: Any) -> Iterator[Any]:
    share = _rope(config).get("partial_rotary_factor", 1.0)
    yield from (int(width * share) for width in _head_dim(config) if width is not None)
    if hasattr(config, "global_head_dim"):
        yield config.global_head_dim


def _rope_type(config: Any) -> Iterator[Any]:
    rope_type = _rope(config).get("rope_type", "default")
    yield "none" if rope_type == "default" else rope_type


def _attention_scale(config: Any) -> Iterator[Any]:
    scale = getattr(config, "attention_multiplier", None)
    width = getattr(config, "query_pre_attn_scalar", None) or next(_head_dim(config))
    yield scale if scale is not None else width**-0.5


def _gating(config: Any) -> Iterator[Any]:
    yield {"softmax": 1, "sigmoid": 2}.get(getattr(config, "scoring_func", "softmax"))


def _window_pattern(config: Any) -> Iterator[Any]:
    layers = [
        layer_type == "sliding_attention"
        for layer_type in getattr(config, "layer_types", None) or ()
    ]
    yield tuple(layers)
    # a number n means that every n-th layer has full attention
    yield from (
        n
        for n in range(1, len(layers) + 1)
        if layers == [bool((i + 1) % n) for i in range(len(layers))]
    )


_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon")
_NONE = (0, False, None)

_ACCEPTED: Mapping[str, Callable[[Any], Iterator[Any]]] = {
    "attention.causal": lambda config: iter((True,)),
    "attention.clamp_kqv": lambda config: iter((0,)),
    "attention.key_length": _head_dim,
    "attention.key_length_swa": _head_dim,
    "attention.value_length": _head_dim,
    "attention.value_length_swa": _head_dim,
    "attention.layer_norm_epsilon": _attribute(*_EPSILONS),
    "attention.layer_norm_rms_epsilon": _attribute(*_EPSILONS),
    "attention.max_alibi_bias": lambda config: iter((0,)),
    "attention.output_scale": lambda config: iter((0, 1)),
    "attention.scale": _attention_scale,
    "attention.shared_kv_layers": _attribute("num_kv_shared_layers", neutral=_NONE),
    "attention.sliding_window": _attribute("sliding_window", neutral=_NONE),
    "attention.sliding_window_pattern": _window_pattern,
    "attn_logit_softcapping": _attribute("attn_logit_softcapping", neutral=_NONE),
    "decoder_block_count": _attribute("num_decoder_layers"),
    "embedding_length_per_layer_input": _attribute("hidden_size_per_layer_input", neutral=_NONE),
    "embedding_scale": _attribute("embedding_multiplier", neutral=(0, 1)),
    "expert_count": _attribute("num_experts", "num_local_experts", neutral=_NONE),
    "expert_gating_func": _gating,
    "expert_group_count": _attribute("n_group", neutral=(0, 1)),
    "expert_group_used_count": _attribute("topk_group", neutral=(0, 1)),
    "expert_shared_count": _attribute("n_shared_experts", neutral=_NONE),
    "expert_used_count": _attribute("num_experts_per_tok", neutral=_NONE),
    "expert_weights_norm": _attribute("norm_topk_prob", neutral=_NONE),
    "expert_weights_scale": _attribute("routed_scaling_factor", neutral=(0, 1)),
    "final_logit_softcapping": _attribute("final_logit_softcapping", neutral=_NONE),
    "leading_dense_block_count": _attribute("first_k_dense_replace", neutral=_NONE),
    "logit_scale": _attribute("logit_scale", neutral=(0, 1)),
    "residual_scale": _attribute("residual_multiplier", neutral=(0, 1)),
    "rope.dimension_count": _rotary_dims,
    "rope.dimension_count_swa": _rotary_dims,
    "rope.freq_base": _rotary("rope_theta"),
    "rope.freq_base_swa": _rotary("rope_theta", layer_type="sliding_attention"),
    "rope.scale_linear": _rotary("factor", 0, 1),
    "rope.scaling.alpha": lambda config: iter((0, 1)),
    "rope.scaling.attn_factor": _rotary("attention_factor", 0, 1),
    "rope.scaling.factor": _rotary("factor", 0, 1),
    "rope.scaling.type": _rope_type,
    "rope.scaling.yarn_attn_factor": lambda config: iter((1,)),
    "rope.scaling.yarn_beta_fast": _rotary("beta_fast", 32),
    "rope.scaling.yarn_beta_slow": _rotary("beta_slow", 1),
    "rope.scaling.yarn_ext_factor": lambda config: iter((-1, 1)),
    "rope.scaling.yarn_log_multiplier": lambda config: iter((0,)),
    "ssm.dt_b_c_rms": lambda config: iter((False,)),
    "use_parallel_residual": _attribute("use_parallel_residual", neutral=_NONE),
}
