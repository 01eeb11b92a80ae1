"""The generation settings of a lowered model."""

from __future__ import annotations

from pathlib import Path

from transformers import GenerationConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from reroll.rewrite.program import Program

FILE = "generation_config.json"


def generation_config(program: Program) -> GenerationConfig | None:
    """The original model's settings: its file of them, else what its configuration says."""
    path = program.origin.files.get(FILE)
    if path is not None and Path(path).is_file():
        return GenerationConfig.from_pretrained(Path(path).parent, Path(path).name)
    original = dict(program.origin.config)
    try:
        config = CONFIG_MAPPING[original.get("model_type")].from_dict(original)
    except (KeyError, TypeError, ValueError):
        return None
    return GenerationConfig.from_model_config(config)
