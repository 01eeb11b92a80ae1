"""Finding what is declared as classes: one file, one pass, mixer, target, stage or measure.

Every module of a folder is imported, and what other distributions add by an entry point is loaded;
then things are looked up by their names.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any, TypeVar

from reroll.errors import UsageError
from reroll.rewrite.pipeline.options import nearest_name

T = TypeVar("T")

log = logging.getLogger(__name__)


def classes_of(module: ModuleType, base: type[T]) -> list[type[T]]:
    """The concrete subclasses of `base` with a `name` that a module itself defines."""
    return [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, base)
        and value.__module__ == module.__name__
        and getattr(value, "name", None)
        and not inspect.isabstract(value)
    ]


def classes_in(folder: str, base: type[T]) -> Iterator[type[T]]:
    """Those of every module of a package, which is given by name."""
    package = importlib.import_module(folder)
    for info in pkgutil.walk_packages(package.__path__, f"{folder}."):
        yield from classes_of(importlib.import_module(info.name), base)


def add_entry_points(group: str, base: type[T], add: Callable[[type[T]], Any]) -> list[str]:
    """Add what other distributions declare: a module with classes, or a class.

    Somebody else's broken package must not take ours down, nor stay unseen: what failed is logged,
    and returned.
    """
    failures = []
    for point in entry_points(group=group):
        try:
            loaded = point.load()
            for cls in classes_of(loaded, base) if isinstance(loaded, ModuleType) else [loaded]:
                add(cls)
        except Exception as error:
            failure = f"entry point {point.name} ({point.value}) failed: {error}"
            log.warning("%s", failure)
            failures.append(failure)
    return failures


def look_up(
    known: Mapping[str, T], name: str, what: str, where: str | None = None, also: str | None = None
) -> T:
    """What has this name; UsageError with the nearest spelling, and `also`, if nothing has."""
    if name not in known:
        hints = [h for h in (nearest_name(name, sorted(known)), also) if h]
        raise UsageError(f"there is no {what} {name!r}", where, "\n  ".join(hints) or None)
    return known[name]
