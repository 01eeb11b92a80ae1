"""ListOps: nested operations on digits, whose value is a digit.

MIN, MAX, MED (median, rounded down) and SM (sum modulo 10) have two or more arguments, each a digit
or another operation (Nangia and Bowman, 2018, arXiv 1804.06028). The trees are drawn as in Long
Range Arena (Tay et al., 2020, arXiv 2011.04006). An argument is an operation with probability 1/4
above depth 10, and operations have 2 to 10 arguments. A tree is accepted if its number of symbols,
with brackets, is in the requested range; Long Range Arena requests 500 to 2,000.

Here the models are not trained on it. Each question comes after `shots` solved ones of at most
`shot_symbols` symbols, and is answered by the likelihood of the ten digits.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

from reroll.bounds import COUNT, COUNT_OR_NONE, LARGEST, Range
from reroll.evaluate.answers import ask, cell, encode, mean
from reroll.evaluate.measure import Bench, Measure, NotApplicable
from reroll.evaluate.runner import Runner
from reroll.rewrite.pipeline.options import option

OPERATIONS: dict[str, Callable[[Sequence[int]], int]] = {
    "MIN": min,
    "MAX": max,
    "MED": lambda values: int(statistics.median(values)),
    "SM": lambda values: sum(values) % 10,
}
DEPTH = 10
ARGUMENTS = 10
NESTED = 0.25

Tree: TypeAlias = "int | tuple[str, list[Tree]]"


class ListOps(Measure):
    """ListOps by few-shot likelihood, in ranges of length up to Long Range Arena's."""

    name = "listops"
    full: ClassVar[Mapping[str, Any]] = {"symbols": [16, 64, 256, 2000], "samples": 20}

    symbols: list[int] = option(
        [16, 64],
        within=Range(least=4, most=LARGEST),
        help="the most symbols in a question; the fewest are a quarter of them",
    )
    samples: int = option(12, within=COUNT, help="questions for each range")
    shots: int = option(4, within=COUNT_OR_NONE, help="solved questions before each")
    shot_symbols: int = option(
        16, within=Range(least=4, most=LARGEST), help="the most symbols in a solved question"
    )

    def run(self, bench: Bench) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for side, runner in bench.sides.items():
            runner.need_generation()
            cells = []
            for most in self.symbols:
                bench.progress(0, 0, f"{side}, up to {most} symbols")
                at_length = self._at(bench, runner, most)
                cells += [] if at_length is None else [at_length]
            if not cells:
                raise NotApplicable("no question fits into the model's context")
            result[side] = {
                **{key: mean([c[key] for c in cells]) for key in ("accuracy", "exact", "chance")},
                "cells": cells,
            }
        return result

    def headline(self, result: Mapping[str, Any]) -> dict[str, float | int | None]:
        return {
            f"up to {c['symbols']:,} symbols (chance {c['chance']:.2f})": c["accuracy"]
            for c in result["cells"]
        }

    def _at(self, bench: Bench, runner: Runner, most: int) -> dict[str, Any] | None:
        questions = []
        for sample in range(self.samples):
            random = bench.random("listops", most, sample)
            shots = [draw(random, 4, self.shot_symbols) for _ in range(self.shots)]
            asked = draw(random, max(most // 4, 4), most)
            text = "".join(f"{write(t)} = {value(t)}\n" for t in shots) + f"{write(asked)} ="
            digits = [f" {d}" for d in range(10)]
            questions.append(encode(runner, text, digits, value(asked)))
        if runner.limit and max(q.length for q in questions) > runner.limit:
            return None
        return cell(ask(runner, questions), 0.1, symbols=most)


def draw(random: random.Random, fewest: int, most: int) -> Tree:
    """Draw a random tree, an operation at its root, with between `fewest` and `most` symbols."""
    while True:
        tree = _operation(random, 1, most)
        if tree is not None and fewest <= size(tree) <= most:
            return tree


def _operation(random: random.Random, depth: int, room: int) -> Tree | None:
    """Draw an operation; return None as soon as it has more than `room` symbols."""
    arguments: list[Tree] = []
    room -= 2
    for _ in range(random.randint(2, ARGUMENTS)):
        nested = depth < DEPTH and random.random() < NESTED
        child = _operation(random, depth + 1, room) if nested else random.randrange(10)
        if child is None:
            return None
        room -= size(child)
        if room < 0:
            return None
        arguments.append(child)
    return random.choice(list(OPERATIONS)), arguments


def size(tree: Tree) -> int:
    """Count the symbols of a tree: digits, opening and closing brackets."""
    return 1 if isinstance(tree, int) else 2 + sum(map(size, tree[1]))


def value(tree: Tree) -> int:
    """Evaluate a tree."""
    return tree if isinstance(tree, int) else OPERATIONS[tree[0]]([value(t) for t in tree[1]])


def write(tree: Tree) -> str:
    """Write a tree as text: `[MAX 2 [MIN 8 3 ] 5 ]`."""
    if isinstance(tree, int):
        return str(tree)
    return f"[{tree[0]} {' '.join(map(write, tree[1]))} ]"
