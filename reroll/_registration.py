"""Making the packages above `rewrite` known: to Programs, and to transformers' auto classes.

Everything is registered by the name of its module, and imported when it is first used.
"""

from __future__ import annotations

from types import ModuleType

from reroll._hooks import after_import


def register() -> None:
    """Arrange for everything to be registered as soon as it can be."""
    after_import("transformers.models.auto.configuration_auto", _configuration)


def _configuration(auto: ModuleType) -> None:
    from reroll.runtime.models.config import RerollConfig

    # the configuration registers the model classes when one is made
    auto.AutoConfig.register(RerollConfig.model_type, RerollConfig, exist_ok=True)
