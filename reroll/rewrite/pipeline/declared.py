"""A class whose fields are its options: checked, documented, and read from text or a recipe.

Passes are declared in this way, and so is everything else that a recipe composes.
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


# without field specifiers: type checkers find a default of theirs by its keyword only, and that of
# `option` stands first
@dataclass_transform(kw_only_default=True, frozen_default=True)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Declared:
    """Base of what is declared by its options.

    A subclass sets `name`, how it is called in text, and is made a frozen dataclass with keyword
    arguments; its docstring and its fields' help are the documentation. `what` says in errors what
    kind of thing it is.
    """

    what: ClassVar[str] = ""
    name: ClassVar[str] = ""

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        # dataclass supplies a signature as a docstring; that documents nothing
        if "__doc__" in vars(cls) and (cls.__doc__ or "").startswith(f"{cls.__name__}("):
            cls.__doc__ = None

    def __post_init__(self) -> None:
        for key, declared in options_of(type(self)).items():
            value = declared.convert(getattr(self, key), f"{self.what} {self.name}")
            object.__setattr__(self, key, value)
        self._check_together()

    def _check_together(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise UsageError if the options do not fit together; nothing by default."""

    @classmethod
    def options(cls) -> dict[str, Option]:
        """The declared options by name, in order."""
        return options_of(cls)

    @classmethod
    def make(cls, options: Mapping[str, Any]) -> Self:
        """One with these options; UsageError for one that is unknown, missing or wrong."""
        declared = cls.options()
        for key in options:
            if key not in declared:
                raise UsageError(
                    f"there is no option {key!r}",
                    where=f"{cls.what} {cls.name}, option {key}",
                    hint=nearest_name(str(key), declared) or f"this {cls.what} has no options",
                )
        for key, value in declared.items():
            if value.default is REQUIRED and key not in options:
                raise UsageError(
                    f"{key} has to be given: {value.kind}",
                    where=f"{cls.what} {cls.name}, option {key}",
                )
        return cls(**options)

    def given(self) -> dict[str, Any]:
        """The options that differ from their defaults, as plain data."""
        return {
            key: plain(getattr(self, key))
            for key, declared in self.options().items()
            if declared.default is REQUIRED or getattr(self, key) != declared.default
        }

    @classmethod
    def summary(cls) -> str:
        """The first line of the documentation."""
        return cls.documentation().partition("\n")[0]

    @classmethod
    def documentation(cls) -> str:
        """The class's own docstring, without its indentation."""
        return inspect.cleandoc(cls.__doc__ or "")

    @classmethod
    def describe(cls) -> dict[str, Any]:
        """Everything that the declaration says, as JSON data."""
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
