"""Passes for the tests of the machinery; none of them is registered by itself."""

from __future__ import annotations

import enum
from typing import Any, Literal

from reroll.rewrite.ir.program import Program
from reroll.rewrite.pipeline.base import Context, Pass, option


class Colour(enum.Enum):
    RED = "red"
    GREEN = "green"


class Everything(Pass):
    """Has an option of every kind.

    And a second paragraph.
    """

    name = "everything"
    contract = "exact"

    count: int = option(help="a number that has to be given")
    ratio: float = option(0.5, help="a fraction")
    on: bool = option(False, help="a switch")
    word: str = option("", help="any text")
    choice: Literal["up", "down", 3] = option("up", help="one of three")
    colour: Colour = option(Colour.RED, help="a colour")
    layers: list[int] = option([], help="some numbers")
    pair: tuple[float, ...] = option((), help="some fractions")
    ranks: dict[str, int] = option({}, help="numbers by name")
    nested: dict[str, list[str]] = option({}, help="words by name")
    limit: int | float | Literal["full"] | None = option(None, help="a limit, if any")
    anything: Any = option(None, help="whatever there is")

    def run(self, program: Program, context: Context) -> Program:
        return program


class Plain(Pass):
    """Has no options."""

    name = "plain"

    def run(self, program: Program, context: Context) -> Program:
        return program
