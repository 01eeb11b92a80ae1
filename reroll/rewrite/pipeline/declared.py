"""Classes whose fields are their options: checked, documented, and read from text or a recipe.

Passes are declared in this way, and so are mixers, targets, stages and measures.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, Self, dataclass_transform

from reroll.errors import UsageError
from reroll.rewrite.pipeline.options import (
    REQUIRED,
    Option,
    nearest_name,
    options_of,
    plain,
)


# no field specifiers: type checkers recognise the default of a specifier by its keyword only, and
# `option` takes its default as the first positional argument
@dataclass_transform(kw_only_default=True, frozen_default=True)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Declared:
    """Base of classes that are declared by their options.

    A subclass sets `name`, its name in text, and becomes a frozen dataclass with keyword arguments.
    Its docstring and its fields' help are the documentation. `category` is named in errors, such
    as "pass".
    """

    category: ClassVar[str] = ""
    name: ClassVar[str] = ""

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        # dataclass sets the signature as a docstring, which is no documentation
        if "__doc__" in vars(cls) and (cls.__doc__ or "").startswith(f"{cls.__name__}("):
            cls.__doc__ = None

    def __post_init__(self) -> None:
        for key, declared in options_of(type(self)).items():
            value = declared.convert(getattr(self, key), f"{self.category} {self.name}")
            object.__setattr__(self, key, value)
        self._check_together()

    def _check_together(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise UsageError if the options do not fit together; accept all by default."""

    @classmethod
    def options(cls) -> dict[str, Option]:
        """Return the declared options by name, in order."""
        return options_of(cls)

    @classmethod
    def make(cls, options: Mapping[str, Any]) -> Self:
        """Construct an instance; UsageError for an unknown, missing or invalid option."""
        declared = cls.options()
        for key in options:
            if key not in declared:
                raise UsageError(
                    f"there is no option {key!r}",
                    where=f"{cls.category} {cls.name}, option {key}",
                    hint=nearest_name(str(key), declared) or f"this {cls.category} has no options",
                )
        for key, value in declared.items():
            if value.default is REQUIRED and key not in options:
                raise UsageError(
                    f"{key} has to be given: {value.kind}",
                    where=f"{cls.category} {cls.name}, option {key}",
                )
        return cls(**options)

    def changed_options(self) -> dict[str, Any]:
        """Return the options that differ from their defaults, as plain data."""
        return {
            key: plain(getattr(self, key))
            for key, declared in self.options().items()
            if declared.default is REQUIRED or getattr(self, key) != declared.default
        }

    @classmethod
    def summary(cls) -> str:
        """Return the first line of the documentation."""
        return cls.documentation().partition("\n")[0]

    @classmethod
    def documentation(cls) -> str:
        """Return the class's own docstring, without its indentation."""
        return inspect.cleandoc(cls.__doc__ or "")

    @classmethod
    def describe(cls) -> dict[str, Any]:
        """Return the whole declaration as JSON data."""
        return {
            "name": cls.name,
            "summary": cls.summary(),
            "documentation": cls.documentation(),
            "options": [
                {
                    "name": o.name,
                    "kind": o.kind,
                    "required": o.default is REQUIRED,
                    "default": None if o.default is REQUIRED else plain(o.default),
                    "help": o.help,
                }
                for o in cls.options().values()
            ],
        }
