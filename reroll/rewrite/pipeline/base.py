"""Base class of passes: fields are the options, and `run` maps a Program to a Program.

    class ScaleLogits(Pass):
        '''Multiply the logits by a constant.'''

        name = "scale_logits"
        contract = "approximate"
        factor: float = option(1.0, help="what to multiply by")

        def run(self, program: Program, context: Context) -> Program: ...

The fields are the Python arguments, the options in pipeline text, the keys in recipes, and the
documentation. Subclasses become frozen dataclasses with keyword arguments. Values are checked
against the annotations when a pass is constructed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

from reroll.rewrite.analysis.context import Context
from reroll.rewrite.ir.program import Program
from reroll.rewrite.pipeline.call_text import call_to_text
from reroll.rewrite.pipeline.declared import Declared
from reroll.rewrite.pipeline.options import option
from reroll.rewrite.pipeline.registry import Registry

__all__ = ["PASSES", "Context", "Contract", "Pass", "option"]

Contract = Literal["exact", "approximate"]


class Pass(Declared, ABC):
    """Base of all passes.

    A subclass sets `name` (its name in pipeline text), `contract`, and optionally `requires`: the
    names of passes that must have run before. `contract` is "exact" if the result computes the same
    function, which the pass manager checks after every run. It is "approximate" if not; then the
    manager measures the distance.
    """

    category: ClassVar[str] = "pass"
    contract: ClassVar[Contract] = "approximate"
    requires: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def run(self, program: Program, context: Context) -> Program:
        """Rewrite a program. `program` is a copy whose graphs may be edited in place.

        Raises PassError if the program or the options do not allow the rewrite.
        """

    def __str__(self) -> str:
        return call_to_text(self.name, self.changed_options())

    @classmethod
    def describe(cls) -> dict[str, Any]:
        declared = super().describe()
        return {
            "name": declared.pop("name"),
            "contract": cls.contract,
            "requires": list(cls.requires),
            **declared,
        }


PASSES = Registry(Pass, "reroll.passes", "reroll.passes", "pipeline")  # type: ignore[type-abstract]
