"""Register the packages above `rewrite`: with Programs, and with transformers' auto classes.

Everything is registered by the name of its module, and imported when it is first used.
"""

from __future__ import annotations

from types import ModuleType

from reroll._hooks import after_import


def register() -> None:
    """Register reroll's configuration class as soon as transformers' auto classes are imported."""
    after_import("transformers.models.auto.configuration_auto", _configuration)


def _configuration(auto: ModuleType) -> None:
    from reroll.runtime.models.config import RerollConfig

    # creating a configuration registers the model classes
    auto.AutoConfig.register(RerollConfig.model_type, RerollConfig, exist_ok=True)
