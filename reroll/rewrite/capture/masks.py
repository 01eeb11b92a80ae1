"""Translate the mask functions of transformers to arguments of `reroll::mask`.

transformers composes a mask of small functions of (batch, head, query, key). Each is identified by
the function that created it, and its numbers are read from its closure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from reroll.errors import CaptureError


@dataclass(frozen=True)
class MaskKind:
    """Parameters of a mask that do not depend on the padding: see `ops.mask`."""

    causal: bool = False
    window: int | None = None
    chunk: int | None = None
    blocks: Tensor | None = None


# the variable with a mask function's number, if any, by the function that creates it
_PARTS = {
    "causal_mask_function": "",
    "bidirectional_mask_function": "",
    "sliding_window_overlay": "sliding_window",
    "sliding_window_bidirectional_overlay": "sliding_window",
    "chunked_overlay": "chunk_size",
}


def describe_mask(function: Callable[..., Any]) -> MaskKind:
    """Return the parameters of a transformers mask function, read from its components.

    Raises CaptureError with the function's name if `ops.mask` does not support its kind.
    """
    if _maker(function) == "or_masks":
        base, *overlays = _closure(function)["mask_functions"]
        mask = describe_mask(base)
        if [_maker(o) for o in overlays] == ["blockwise_overlay"] and mask.blocks is None:
            return replace(mask, blocks=_closure(overlays[0])["block_sequence_ids"])
        raise _not_modelled(function, *overlays)
    parts: dict[str, int] = {}
    for part in _conjuncts(function):
        name = _maker(part)
        if name not in _PARTS:
            raise _not_modelled(part)
        number = int(_closure(part)[_PARTS[name]]) if _PARTS[name] else 0
        if parts.setdefault(name, number) != number:
            raise _not_modelled(function, part)
    causal = "causal_mask_function" in parts
    # a backward window needs a causal mask, and a bidirectional window reaches one key further
    # back than the causal one
    one, other = "sliding_window_overlay", "sliding_window_bidirectional_overlay"
    if (other if causal else one) in parts:
        raise _not_modelled(function, *_conjuncts(function))
    return MaskKind(causal, parts.get(one if causal else other), parts.get("chunked_overlay"))


def _maker(function: Callable[..., Any]) -> str:
    """Return the transformers function that a mask function is or was created by, else ""."""
    if getattr(function, "__module__", "") != "transformers.masking_utils":
        return ""
    return function.__qualname__.split(".")[0]


def _conjuncts(function: Callable[..., Any]) -> list[Callable[..., Any]]:
    """Return the functions whose conjunction a mask function is."""
    if _maker(function) != "and_masks":
        return [function]
    return [inner for part in _closure(function)["mask_functions"] for inner in _conjuncts(part)]


def _not_modelled(*functions: Callable[..., Any]) -> CaptureError:
    names = [f"{f.__module__}.{getattr(f, '__qualname__', repr(f))}" for f in functions]
    return CaptureError(
        f"the attention mask is made by {' with '.join(names)}, a kind that reroll::mask does not "
        "model",
        hint="causal, bidirectional, sliding-window, chunked and block-wise masks are modelled",
    )


def _closure(function: Callable[..., Any]) -> dict[str, Any]:
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    if code is None or cells is None:
        return {}
    return {name: cell.cell_contents for name, cell in zip(code.co_freevars, cells, strict=True)}
