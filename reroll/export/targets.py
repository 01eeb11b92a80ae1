"""Export targets: what `reroll export --target NAME` can write, and where targets are found.

A target is one class in one file of this folder (or of another package, by an entry point of the
group `reroll.targets`). Its fields are its options, in Python and on the command line alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, get_args, get_origin

from reroll.errors import UsageError
from reroll.rewrite.ir.program import Program
from reroll.rewrite.pipeline.declared import Declared
from reroll.rewrite.pipeline.options import nearest_name, option
from reroll.rewrite.pipeline.registry import Registry

__all__ = ["TARGETS", "Target", "find", "option", "registered"]

# called with the amount done, the total, and the name of the stage
Progress = Callable[[int, int, str], None]


class Target(Declared, ABC):
    """Base of all targets. A subclass sets `name`, declares its options, and writes."""

    category: ClassVar[str] = "target"

    def _check_together(self) -> None:
        self.check_options()

    def check_options(self) -> None:
        """Raise UsageError if the options do not fit together; `check` may be one of them."""

    @abstractmethod
    def write(
        self, program: Program, directory: Path, progress: Progress | None = None
    ) -> dict[str, Any]:
        """Write the Program into an empty directory, and return JSON data about what was written.

        Raises ExportError if the Program cannot be expressed or a check fails. The caller then
        deletes the directory.
        """

    @classmethod
    def parse(cls, words: Sequence[str]) -> Self:
        """Make a target from options of a command line: `--graphs loop,step --check`.

        Raises UsageError for unknown options and missing values.
        """
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


def _value(text: str, kind: Any) -> Any:
    """Convert a word of the command line to the value that an option takes."""
    if get_origin(kind) in (list, tuple):
        inner = get_args(kind)[0]
        return [_value(part.strip(), inner) for part in text.split(",") if part.strip()]
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    return {"true": True, "false": False, "none": None}.get(text, text)


TARGETS = Registry(Target, "reroll.export", "reroll.targets")  # type: ignore[type-abstract]

# functions that return all known targets, and the one of a name
registered, find = TARGETS.all, TARGETS.find
