"""Register the packages above `rewrite`: with Programs, transformers' auto classes, and peft.

Everything is registered by the name of its module, and imported when it is first used.
"""

from __future__ import annotations

from types import ModuleType

from reroll._hooks import after_import


def register() -> None:
    """Register with transformers' auto classes, and with peft, as soon as they are imported."""
    after_import("transformers.models.auto.configuration_auto", _configuration)
    after_import("peft.tuners.tuners_utils", _adapters)


def _configuration(auto: ModuleType) -> None:
    from reroll.runtime.models.config import RerollConfig

    # creating a configuration registers the model classes
    auto.AutoConfig.register(RerollConfig.model_type, RerollConfig, exist_ok=True)


def _adapters(tuners_utils: ModuleType) -> None:
    from reroll.runtime.models.adapters import extend

    extend(tuners_utils)
