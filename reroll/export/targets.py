"""Export targets: what `reroll export --target NAME` can write, and where targets are found.

A target is one class in one file of this folder (or of another package, by an entry point of the
group `reroll.targets`). Its fields are its options, in Python and on the command line alike.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import logging
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, dataclass_transform, get_args, get_origin

from reroll.errors import UsageError
from reroll.rewrite.passes.options import Option, nearest_name, option, options_of, plain
from reroll.rewrite.program import Program

__all__ = ["Target", "find", "option", "registered"]

log = logging.getLogger(__name__)

FOLDER = "reroll.export"
GROUP = "reroll.targets"

# called with what is done, what there is in all, and the name of the stage
Progress = Callable[[int, int, str], None]


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(option,))
@dataclasses.dataclass(frozen=True, kw_only=True)
class Target(ABC):
    """Base of all targets. A subclass sets `name`, declares its options, and writes."""

    name: ClassVar[str] = ""

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)

    def __post_init__(self) -> None:
        for key, declared in options_of(type(self)).items():
            try:
                value = declared.convert(getattr(self, key), self.name)
            except UsageError as error:
                where = f"target {self.name}, option {key}"
                raise UsageError(error.message, where, error.hint) from None
            object.__setattr__(self, key, value)
        self.check_options()

    def check_options(self) -> None:  # noqa: B027
        """Raise UsageError if the options do not fit together; nothing by default."""

    @abstractmethod
    def write(
        self, program: Program, directory: Path, progress: Progress | None = None
    ) -> dict[str, Any]:
        """Write the Program into a directory that is empty, and say what was written, as JSON data.

        Raises ExportError if the Program cannot be expressed or a check fails; whatever is in the
        directory then is thrown away.
        """

    @classmethod
    def options(cls) -> dict[str, Option]:
        """The declared options by name, in order."""
        return options_of(cls)

    @classmethod
    def make(cls, options: Mapping[str, Any]) -> Target:
        """A target with these options; UsageError for one that is unknown or wrong."""
        for key in options:
            if key not in cls.options():
                raise UsageError(
                    f"the target {cls.name} has no option {key!r}",
                    hint=nearest_name(key, cls.options()),
                )
        return cls(**options)

    @classmethod
    def parse(cls, words: Sequence[str]) -> Target:
        """A target with options as a command line has them: `--graphs loop,step --check`."""
        declared = cls.options()
        options: dict[str, Any] = {}
        left = list(words)
        while left:
            word = left.pop(0)
            if not word.startswith("--"):
                raise UsageError(f"do not know what {word!r} is for")
            key, equals, text = word[2:].partition("=")
            key = key.replace("-", "_")
            off = key.startswith("no_") and key not in declared
            found = declared.get(key.removeprefix("no_") if off else key)
            if found is None:
                raise UsageError(
                    f"the target {cls.name} has no option --{key.replace('_', '-')}",
                    hint=nearest_name(key, declared),
                )
            if found.type is bool and not equals:
                options[found.name] = not off
                continue
            if not equals:
                if not left:
                    raise UsageError(f"--{found.name} needs a value: {found.kind}")
                text = left.pop(0)
            options[found.name] = _value(text, found.type)
        return cls.make(options)

    @classmethod
    def describe(cls) -> dict[str, Any]:
        """Everything that the declaration says, as JSON data."""
        return {
            "name": cls.name,
            "documentation": inspect.cleandoc(cls.__doc__ or ""),
            "options": [
                {"name": o.name, "kind": o.kind, "default": plain(o.default), "help": o.help}
                for o in cls.options().values()
            ],
        }


def _value(text: str, kind: Any) -> Any:
    """A word of the command line as the value that an option wants."""
    if get_origin(kind) in (list, tuple):
        inner = get_args(kind)[0]
        return [_value(part.strip(), inner) for part in text.split(",") if part.strip()]
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    return {"true": True, "false": False, "none": None}.get(text, text)


def registered() -> dict[str, type[Target]]:
    """All known targets by name, sorted."""
    return dict(sorted(_discover().items()))


def find(name: str) -> type[Target]:
    """The target of this name; UsageError with the nearest spelling if there is none."""
    found = _discover()
    if name not in found:
        raise UsageError(f"there is no target {name!r}", hint=nearest_name(name, sorted(found)))
    return found[name]


@cache
def _discover() -> dict[str, type[Target]]:
    folder = importlib.import_module(FOLDER)
    found: dict[str, type[Target]] = {}
    for info in pkgutil.iter_modules(folder.__path__, f"{FOLDER}."):
        for cls in _targets_of(importlib.import_module(info.name)):
            found[cls.name] = cls
    for point in entry_points(group=GROUP):
        # somebody else's broken package must not take ours down
        try:
            loaded = point.load()
            for cls in _targets_of(loaded) if isinstance(loaded, ModuleType) else [loaded]:
                found.setdefault(cls.name, cls)
        except Exception as error:
            log.warning("entry point %s (%s) failed: %s", point.name, point.value, error)
    return found


def _targets_of(module: ModuleType) -> list[type[Target]]:
    return [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, Target)
        and value.name
        and value.__module__ == module.__name__
    ]
