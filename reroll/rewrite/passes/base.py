"""What a pass is: a class whose fields are its options, and a `run` from Program to Program.

    class ScaleLogits(Pass):
        '''Multiply the logits by a constant.'''

        name = "scale_logits"
        contract = "approximate"
        factor: float = option(1.0, help="what to multiply by")

        def run(self, program: Program, context: Context) -> Program: ...

The fields are the Python arguments, the options in pipeline text, the keys in recipes and the
documentation. Subclasses are made frozen dataclasses with keyword arguments; values are checked
against the annotations when a pass is made.
"""

from __future__ import annotations

import dataclasses
import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, dataclass_transform

from reroll.errors import UsageError
from reroll.rewrite.passes.context import Context
from reroll.rewrite.passes.options import REQUIRED, Option, nearest_name, option, options_of, plain
from reroll.rewrite.program import Program

__all__ = ["Context", "Contract", "Pass", "option"]

Contract = Literal["exact", "approximate"]


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(option,))
@dataclasses.dataclass(frozen=True, kw_only=True)
class Pass(ABC):
    """Base of all passes.

    A subclass sets `name` (how it is called in text), `contract`, and if need be `requires`: the
    names of passes that must have run before. `contract` is "exact" when the result computes the
    same function, which the pass manager checks after every run, or "approximate", for which it
    measures the distance.
    """

    name: ClassVar[str] = ""
    contract: ClassVar[Contract] = "approximate"
    requires: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        # dataclass supplies a signature as a docstring; that documents nothing
        if "__doc__" in vars(cls) and (cls.__doc__ or "").startswith(f"{cls.__name__}("):
            cls.__doc__ = None

    def __post_init__(self) -> None:
        for key, declared in options_of(type(self)).items():
            value = declared.convert(getattr(self, key), self.name)
            object.__setattr__(self, key, value)
        self.check()

    def check(self) -> None:  # noqa: B027
        """Raise UsageError if the options do not fit together; nothing by default."""

    @abstractmethod
    def run(self, program: Program, context: Context) -> Program:
        """The rewritten program. `program` is the pass's own copy, its graphs may be edited.

        Raises PassError if the pass cannot do what it was asked to do.
        """

    @classmethod
    def options(cls) -> dict[str, Option]:
        """The declared options by name, in order."""
        return options_of(cls)

    @classmethod
    def make(cls, options: Mapping[str, Any]) -> Pass:
        """A pass with these options; UsageError for one that is unknown, missing or wrong."""
        declared = cls.options()
        for key in options:
            if key not in declared:
                raise UsageError(
                    f"there is no option {key!r}",
                    where=f"pass {cls.name}, option {key}",
                    hint=nearest_name(str(key), declared) or "this pass has no options",
                )
        for key, value in declared.items():
            if value.default is REQUIRED and key not in options:
                raise UsageError(
                    f"{key} has to be given: {value.kind}", where=f"pass {cls.name}, option {key}"
                )
        return cls(**options)

    def given(self) -> dict[str, Any]:
        """The options that differ from their defaults, as plain data."""
        return {
            key: plain(getattr(self, key))
            for key, declared in self.options().items()
            if declared.default is REQUIRED or getattr(self, key) != declared.default
        }

    def __str__(self) -> str:
        from reroll.rewrite.passes.pipeline import call_to_text

        return call_to_text(self.name, self.given())

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
            "contract": cls.contract,
            "requires": list(cls.requires),
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
