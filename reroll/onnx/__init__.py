"""Decode with exported ONNX models: ONNX Runtime and NumPy alone, without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from reroll.errors import UsageError

if TYPE_CHECKING:
    from reroll.onnx.runner import Runner, Sequence, load

__all__ = ["Runner", "Sequence", "load"]


def __getattr__(name: str) -> Any:
    # ONNX Runtime is an optional dependency
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    try:
        return getattr(import_module(f"{__name__}.runner"), name)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"exported models run in {error.name}",
            where=__name__,
            hint="pip install 'reroll[onnx]'",
        ) from error
