"""The configuration of a lowered model: the original's own entries, and the cache layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from reroll.rewrite.analysis.state_plan import plan_states
from reroll.rewrite.ir.program import Program
from reroll.runtime.models.auto import register_models
from reroll.runtime.state.caches import cache_config

# entries that belong to the original's class, to its file, or to the cache layers
_DROPPED = {
    "model_type", "architectures", "transformers_version", "auto_map", "dtype", "torch_dtype",
    "layer_types", "sliding_window", "attention_chunk_size", "per_layer_config", "kv_sharing_modes",
    "text_config", "_name_or_path", "name_or_path", "quantization_config", "mlp_layer_types",
    "_attn_implementation", "attn_implementation", "rope_scaling", "return_dict",
    "use_return_dict", "num_labels", "is_reroll",
}  # fmt: skip


class RerollConfig(PreTrainedConfig):
    """Configuration of a model that reroll has lowered.

    It has the original configuration's entries under their names, those of a nested text model at
    the top level. It adds `original_model_type`, `program_file`, and what transformers needs to
    build the caches.
    """

    model_type = "reroll"

    original_model_type: str = ""
    program_file: str = "program.json"
    is_encoder_decoder: bool = False
    tie_word_embeddings: bool = False
    use_cache: bool = True

    @property
    def auto_map(self) -> dict[str, str]:
        """Classes in files of the model's directory, of which a lowered model has none."""
        return {}

    def __post_init__(self, **kwargs: Any) -> None:
        # loading a saved model makes its configuration first, and then looks up its class
        register_models(RerollConfig)
        super().__post_init__(**kwargs)

    @property
    def output_attentions(self) -> bool:
        """Whether a forward returns attention weights by default."""
        return bool(self._output_attentions)

    @output_attentions.setter
    def output_attentions(self, value: bool) -> None:
        # transformers refuses it beside fused attention; a lowered model has no need to be told
        # which attention to run
        self._output_attentions = value

    def validate_output_attentions(self) -> None:
        """Do nothing: weights are computed when they are asked for."""

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        """Return this configuration, which has the text model's entries at the top level."""
        del decoder, encoder
        return self

    @classmethod
    def from_program(cls, program: Program) -> RerollConfig:
        """Make the configuration of a Program's lowered model."""
        original = program.origin.config
        entries = _flat(original)
        entries.update(cache_config(plan_states(program).layers))
        entries["original_model_type"] = str(original.get("model_type", ""))
        entries["dtype"] = str(program.dtype).removeprefix("torch.")
        return cls(**entries)


def _flat(original: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the entries of a nested text model, and those under general names, into one level."""
    entries = dict(original)
    nested = original.get("text_config")
    if isinstance(nested, Mapping):
        entries = {**nested, **entries}
    aliases = _attribute_map(entries.get("model_type"))
    for general, specific in aliases.items():
        if specific in entries:
            entries.setdefault(general, entries[specific])
    return {k: v for k, v in entries.items() if k not in _DROPPED}


def _attribute_map(model_type: Any) -> Mapping[str, str]:
    """Return the general names of configuration entries of a model type, with the names it uses."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        attributes = CONFIG_MAPPING[model_type].attribute_map
    except (KeyError, TypeError):
        return {}
    return dict(attributes)


def resized_config(config: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """Return an original's configuration with another number of tokens in its vocabulary.

    The number is set under its general name and the model type's own, and in a nested text model.
    """
    specific = _attribute_map(config.get("model_type")).get("vocab_size", "vocab_size")
    nested = config.get("text_config")
    changed = {**config, "vocab_size": tokens}
    if specific in config:
        changed[specific] = tokens
    if isinstance(nested, Mapping):
        changed["text_config"] = resized_config(nested, tokens)
    return changed
