"""Where mixers are found: every module of this folder, and entry points of `reroll.mixers`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from typing import Any

from torch import Tensor

from reroll.errors import UsageError
from reroll.mixers.base import Mixer
from reroll.rewrite.ir.rules import register_rule
from reroll.rewrite.pipeline.discovery import add_entry_points, classes_in, look_up
from reroll.rewrite.pipeline.options import check_options

PACKAGE = "reroll.mixers"

_mixers: dict[str, type[Mixer]] = {}


def registered() -> dict[str, type[Mixer]]:
    """All known mixers by name, sorted."""
    discover()
    return dict(sorted(_mixers.items()))


def find(name: str) -> type[Mixer]:
    """The mixer of this name; UsageError with the nearest spelling if there is none."""
    discover()
    return look_up(_mixers, name, "mixer", "mixers")


def make(name: str, options: str | Mapping[str, Any] = "{}") -> Mixer:
    """A mixer with its options, given as a mapping or as JSON text.

    Raises UsageError if the mixer has no such option, or the value is not one that it takes.
    """
    text = options if isinstance(options, str) else json.dumps(dict(options))
    return _make(name, text)


@lru_cache(maxsize=256)
def _make(name: str, text: str) -> Mixer:
    cls = find(name)
    try:
        values = json.loads(text)
    except ValueError as error:
        raise UsageError(f"the options are not JSON: {error}", where=f"mixer {name}") from error
    return cls.make(values)


def register(cls: type[Mixer]) -> type[Mixer]:
    """Add one mixer; UsageError if another one has its name. Usable as a class decorator."""
    known = _mixers.get(cls.name)
    check_options(cls)
    if known is not None and known.__module__ != cls.__module__:
        raise UsageError(
            f"there are two mixers called {cls.name!r}",
            where=f"{known.__module__} and {cls.__module__}",
            hint="rename one of them",
        )
    _mixers[cls.name] = cls
    register_rule(cls.name, _Rule(cls.name))
    return cls


@cache
def discover() -> None:
    """Import every module of the folder and register the mixers in it, once."""
    for cls in classes_in(PACKAGE, Mixer):  # type: ignore[type-abstract]
        register(cls)
    add_entry_points(PACKAGE, Mixer, register)  # type: ignore[type-abstract]


class _Rule:
    """A mixer as the op `recurrence` and its costs see it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Sequence[Tensor],
        options: str,
        padding: Tensor | None,
    ) -> Tensor:
        return make(self.name, options).chunk(q, k, v, gates, padding=padding)[0]

    def flops(self, options: str, heads: int, kv_heads: int, d_k: int, d_v: int) -> int:
        return make(self.name, options).flops(heads, kv_heads, d_k, d_v)

    def state_bytes(self, options: str, kv_heads: int, d_k: int, d_v: int) -> int:
        return make(self.name, options).state_bytes(kv_heads, d_k, d_v)
