"""Running Programs: lowered modules, their state, and generation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reroll.runtime.lowering.lower import lower
    from reroll.runtime.lowering.recapture import untie

__all__ = ["lower", "untie"]

_HOMES = {"lower": "lowering.lower", "untie": "lowering.recapture"}


def __getattr__(name: str) -> Any:
    # transformers takes seconds to import, and is needed only when something is lowered
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
