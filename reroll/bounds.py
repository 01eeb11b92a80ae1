"""Ranges of numbers, checked alike in options, recipes, commands and calls."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real

from reroll.errors import UsageError

# the largest count that fits the integer types of all libraries
LARGEST = 2**31 - 1


@dataclass(frozen=True)
class Range:
    """Finite numbers in a range: `least` and `most` inclusive, `above` and `below` exclusive."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def __contains__(self, number: float) -> bool:
        return (
            # an integer may be too large for a float
            (isinstance(number, int) or math.isfinite(number))
            and (self.least is None or number >= self.least)
            and (self.most is None or number <= self.most)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        if self.most == LARGEST:
            return f"{self.least} or more"
        if self.least is not None and self.most is not None:
            return f"from {self.least} to {self.most}"
        bounds = {
            "{} or more": self.least,
            "above {}": self.above,
            "at most {}": self.most,
            "below {}": self.below,
        }
        words = [text.format(bound) for text, bound in bounds.items() if bound is not None]
        return " and ".join(words) or "finite"


COUNT = Range(least=1, most=LARGEST)
COUNT_OR_NONE = Range(least=0, most=LARGEST)
SHARE = Range(least=0, most=1)
POSITIVE = Range(above=0)
NOT_NEGATIVE = Range(least=0)
BETWEEN = Range(above=0, below=1)
# the share of the probability that tokens are sampled from
TOP_P = Range(above=0, most=1)
FINITE = Range()
# sizes of new weights and states: above any useful one, but small enough for memory
SIZE = Range(least=1, most=2**16)
# tokens of a window of text, special ones included
WINDOW = Range(least=8, most=LARGEST)
# tokens to train on
TOKENS = Range(least=1, most=10**15)
# seeds that every random generator accepts
SEED = Range(least=0, most=2**32 - 1)


def problem_with(number: object, within: Range, *, integer: bool) -> str | None:
    """Describe what `number` must be to lie in a range; None if it does."""
    # numbers of numpy are instances too
    if isinstance(number, Integral if integer else Real) and not isinstance(number, bool):
        value = int(number) if isinstance(number, Integral) else float(number)
        if value in within:
            return None
        if within.most == LARGEST and value > LARGEST:
            return f"at most {LARGEST}"
    return f"{'an integer' if integer else 'a number'}, {within}"


def check_number(
    name: str, number: object, within: Range, where: str | None = None, *, integer: bool = True
) -> None:
    """Raise UsageError unless a number that the user gave as `name` lies in a range."""
    if problem := problem_with(number, within, integer=integer):
        raise UsageError(f"{name} must be {problem}, not {_shown(number)}", where)


def _shown(number: object) -> str:
    try:
        return f"{number!r:.40}"
    # Python refuses to format integers of thousands of digits
    except ValueError:
        return "one of thousands of digits"
