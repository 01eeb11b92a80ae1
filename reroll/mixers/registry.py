"""Where mixers are found: every module of this folder, and entry points of `reroll.mixers`."""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import pkgutil
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

from torch import Tensor

from reroll.errors import UsageError
from reroll.mixers.base import Mixer
from reroll.rewrite.passes.options import check_options, nearest_name
from reroll.rewrite.rules import register_rule

PACKAGE = "reroll.mixers"

log = logging.getLogger(__name__)

_mixers: dict[str, type[Mixer]] = {}


def registered() -> dict[str, type[Mixer]]:
    """All known mixers by name, sorted."""
    discover()
    return dict(sorted(_mixers.items()))


def find(name: str) -> type[Mixer]:
    """The mixer of this name; UsageError with the nearest spelling if there is none."""
    discover()
    if name not in _mixers:
        hint = nearest_name(name, sorted(_mixers))
        raise UsageError(f"there is no mixer {name!r}", where="mixers", hint=hint)
    return _mixers[name]


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
    folder = importlib.import_module(PACKAGE)
    for info in pkgutil.iter_modules(folder.__path__, f"{PACKAGE}."):
        _add_all(importlib.import_module(info.name))
    for point in entry_points(group=PACKAGE):
        # somebody else's broken package must not take ours down, nor stay unseen
        try:
            loaded = point.load()
            if isinstance(loaded, ModuleType):
                _add_all(loaded)
            else:
                register(loaded)
        except Exception as error:
            log.warning("entry point %s (%s) failed: %s", point.name, point.value, error)


def _add_all(module: ModuleType) -> None:
    for value in list(vars(module).values()):
        if (
            inspect.isclass(value)
            and issubclass(value, Mixer)
            and value.__module__ == module.__name__
            and value.name
            and not inspect.isabstract(value)
        ):
            register(value)


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
