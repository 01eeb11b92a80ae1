"""Find mixers: in every module of this folder, and in entry points of `reroll.mixers`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor

from reroll.errors import UsageError
from reroll.mixers.base import Mixer
from reroll.rewrite.ir.rules import register_rule
from reroll.rewrite.pipeline.registry import Registry


def make(name: str, options: str | Mapping[str, Any] = "{}") -> Mixer:
    """Return a mixer with its options, given as a mapping or as JSON text.

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


class _Rule:
    """Interface of a mixer to the op `recurrence` and its costs."""

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


MIXERS = Registry(
    Mixer,  # type: ignore[type-abstract]
    "reroll.mixers",
    "reroll.mixers",
    "mixers",
    added=lambda cls: register_rule(cls.name, _Rule(cls.name)),
)

# all known mixers; the one of a name; one more
registered, find, register = MIXERS.all, MIXERS.find, MIXERS.add


def discover() -> None:
    """Make all mixers known to the op `recurrence`."""
    MIXERS.all()
