"""Define what a measure is: a name, options for two suites, and a run that gives JSON data.

    class Agreement(Measure):
        '''How often a model finds the same token likeliest as its original.'''

        name = "agreement"

        def run(self, bench: Bench) -> dict[str, Any]: ...

A new measure is one file in `reroll/evaluate/measures`, or a class that
`reroll.rewrite.pipeline.registry` finds in another package.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from reroll.rewrite.pipeline.declared import Declared
from reroll.rewrite.pipeline.registry import Registry

if TYPE_CHECKING:
    from reroll.evaluate.runner import Runner

Suite = Literal["quick", "full"]
Progress = Callable[[int, int, str], None]


class NotApplicable(Exception):
    """A measure cannot be applied to this model; the message says why."""


@dataclass
class Bench:
    """Inputs of measures: the model, its original if there is one, text, and a seed."""

    model: Runner
    original: Runner | None
    text: str
    seed: int = 0
    progress: Progress = field(default=lambda done, total, what: None)

    @property
    def sides(self) -> dict[str, Runner]:
        """Runners by name: "model", and "original" if there is one."""
        sides = {"model": self.model}
        return sides if self.original is None else {**sides, "original": self.original}

    def random(self, *names: object) -> random.Random:
        """Return a random generator seeded by the seed and these names, equal on every machine."""
        return random.Random("/".join(map(str, (self.seed, *names))))

    def need_original(self) -> Runner:
        """Return the original; raises NotApplicable if there is none."""
        if self.original is None:
            raise NotApplicable("there is no original to compare with: give one with --against")
        return self.original


class Measure(Declared, ABC):
    """Base of all measures. A subclass sets `name`.

    The defaults of the options are those of the quick suite; `full` has those of the full suite
    that differ.
    """

    category: ClassVar[str] = "measure"
    full: ClassVar[Mapping[str, Any]] = {}

    @classmethod
    def of_suite(cls, suite: Suite, options: Mapping[str, Any]) -> Measure:
        """Make the measure with a suite's options, overridden by `options`; raises UsageError."""
        return cls.make({**(cls.full if suite == "full" else {}), **options})

    @abstractmethod
    def run(self, bench: Bench) -> dict[str, Any]:
        """Measure, and return JSON data by side: "model", and "original" if there is one.

        Results that belong to no side have keys next to those. Raises NotApplicable.
        """

    @abstractmethod
    def headline(self, result: Mapping[str, Any]) -> dict[str, float | int | None]:
        """Return the few numbers of one side that a table shows, by label."""


MEASURES = Registry(
    Measure,  # type: ignore[type-abstract]
    "reroll.evaluate.measures",
    "reroll.measures",
    "--measures",
)

# all known measures; the one of a name
measures, find = MEASURES.all, MEASURES.find


def within(
    contexts: list[int], runner: Runner, most: int | None = None, *, behind: int = 0
) -> list[int]:
    """Select the contexts that fit the model with `behind` more tokens, and are at most `most`.

    Where the model takes none of them, the result is the longest that it takes.
    """
    limit = None if runner.limit is None else runner.limit - behind
    fitting = [c for c in contexts if limit is None or c <= limit]
    if not fitting and limit is not None and limit > 0:
        fitting = [limit]
    return [c for c in fitting if most is None or c <= most]
