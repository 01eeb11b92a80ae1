"""Making the packages above `rewrite` known: to Programs, and to transformers' auto classes.

Everything is registered by the name of its module, and imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

from reroll._hooks import after_import

# what a Program's methods call: service, module, function
SERVICES = {
    "to_module": ("reroll.runtime.lowering.lower", "lower"),
    "save": ("reroll.export.huggingface", "save"),
    "load": ("reroll.runtime.models.pretrained", "load_program"),
}


def register() -> None:
    """Arrange for everything to be registered as soon as it can be."""
    after_import("reroll.rewrite.ir.program", _services)
    after_import("transformers.models.auto.configuration_auto", _configuration)


def _services(program: ModuleType) -> None:
    for service, (module, function) in SERVICES.items():
        program.provide(service, _Deferred(module, function))


def _configuration(auto: ModuleType) -> None:
    from reroll.runtime.models.config import RerollConfig

    # the configuration registers the model classes when one is made
    auto.AutoConfig.register(RerollConfig.model_type, RerollConfig, exist_ok=True)


class _Deferred:
    """A function that is imported when it is called."""

    def __init__(self, module: str, function: str) -> None:
        self.module = module
        self.function = function

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return getattr(import_module(self.module), self.function)(*arguments, **keywords)
