"""State tracking: problems whose state must be updated along a sequence, as few-shot text.

- `parity`: whether the number of ones in a row of bits is even or odd.
- `modular`: the sum of digits modulo 5.
- `permutation`: the order of three (full suite: five) letters after swaps of two positions each;
  for five the word problem of S5, which is complete for NC1 (Merrill et al., 2024, arXiv
  2404.08819).
- `counting_separated`, `counting_merged`: how often a letter occurs. With spaces between letters,
  each is a token; without spaces, the tokenizer merges them. The difference in accuracy,
  `tokenizer_effect`, is the loss by the tokenizer; `tokens_per_item` shows how much it merges.

`length` is the number of bits, digits, swaps or letters. Each question comes after `shots` solved
ones of the same length. `accuracy` is the choice between the possible answers by likelihood (for
permutations, one for each first letter). `exact` is whether greedy decoding gives the whole answer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, TypeAlias

from reroll.bounds import COUNT, COUNT_OR_NONE, Range
from reroll.errors import UsageError
from reroll.evaluate.answers import ask, cell, encode, mean
from reroll.evaluate.measure import Bench, Measure, NotApplicable
from reroll.evaluate.runner import Runner
from reroll.evaluate.tokenizing import plain_ids
from reroll.rewrite.pipeline.options import option

MODULUS = 5
TRIES = 20


class Problem(NamedTuple):
    """A question as text, its answer, the candidate answers, and the text of its items."""

    question: str
    answer: str
    candidates: list[str]
    items: str


# arguments: random generator, length, a counter over which answers rotate, number of letters
Maker: TypeAlias = Callable[[random.Random, int, int, int], Problem]


class StateTracking(Measure):
    """Parity, modular counting, permutations, counting, as few-shot text."""

    name = "state_tracking"
    full: ClassVar[Mapping[str, Any]] = {"lengths": [2, 4, 8, 16, 32], "samples": 40, "letters": 5}

    tasks: list[str] = option(
        ["parity", "modular", "permutation", "counting_separated", "counting_merged"],
        help="which tasks",
    )
    lengths: list[int] = option([2, 4, 8], within=COUNT, help="items in each sequence")
    shots: int = option(4, within=COUNT_OR_NONE, help="solved questions before each")
    samples: int = option(12, within=COUNT, help="questions for each length")
    letters: int = option(3, within=Range(least=2, most=8), help="permutation: how many letters")

    def check(self) -> None:
        unknown = [t for t in self.tasks if t not in TASKS]
        if unknown:
            raise UsageError(f"there is no task {unknown[0]!r}", self.name, ", ".join(TASKS))

    def run(self, bench: Bench) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for side, runner in bench.sides.items():
            runner.need_generation()
            result[side] = {}
            for task in self.tasks:
                bench.progress(0, 0, f"{side}, {task}")
                cells = [c for n in self.lengths if (c := self._at(bench, runner, task, n))]
                if cells:
                    result[side][task] = _summary(cells)
            _effect(result[side])
        if not result["model"]:
            raise NotApplicable("no question fits into the model's context")
        return result

    def headline(self, result: Mapping[str, Any]) -> dict[str, float | int | None]:
        rows: dict[str, float | int | None] = {
            f"{task} (chance {result[task]['chance']:.2f})": result[task]["accuracy"]
            for task in TASKS
            if task in result
        }
        if "tokenizer_effect" in result:
            rows["counting: the tokenizer's effect"] = result["tokenizer_effect"]
        return rows

    def _at(self, bench: Bench, runner: Runner, task: str, length: int) -> dict[str, Any] | None:
        make = TASKS[task]
        questions, items = [], 0
        for sample in range(self.samples):
            random = bench.random("state_tracking", task, length, sample)
            asked = make(random, length, sample, self.letters)
            shots = [_shot(make, random, length, n, asked, self.letters) for n in range(self.shots)]
            text = "".join(f"{s.question} {s.answer}\n\n" for s in shots) + asked.question
            truth = asked.candidates.index(asked.answer)
            questions.append(encode(runner, text, [f" {c}" for c in asked.candidates], truth))
            items += len(plain_ids(runner.tokenizer, asked.items))
        if runner.limit and max(q.length for q in questions) > runner.limit:
            return None
        answers = ask(runner, questions)
        chance = sum(1 / len(q.candidates) for q in questions) / len(questions)
        summary = cell(answers, chance, length=length)
        return {**summary, "tokens_per_item": items / (length * self.samples)}


def _shot(
    make: Maker, random: random.Random, length: int, turn: int, asked: Problem, letters: int
) -> Problem:
    """Draw a solved problem that differs from the asked one, if there is another of this length."""
    for attempt in range(TRIES):
        # answers of shots rotate, as those of the samples do
        problem = make(random, length, turn + attempt // 4, letters)
        if problem.question != asked.question:
            break
    return problem


def _summary(cells: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        key: mean([c[key] for c in cells])
        for key in ("accuracy", "exact", "chance", "tokens_per_item")
    } | {"cells": cells}


def _effect(result: dict[str, Any]) -> None:
    if "counting_separated" in result and "counting_merged" in result:
        separated, merged = (result[f"counting_{k}"]["accuracy"] for k in ("separated", "merged"))
        result["tokenizer_effect"] = separated - merged


# ---- problems


def parity(random: random.Random, length: int, turn: int, letters: int) -> Problem:
    """Draw a problem: is the number of ones even or odd."""
    bits = [random.randrange(2) for _ in range(length)]
    if sum(bits) % 2 != turn % 2:
        bits[random.randrange(length)] ^= 1
    items = " ".join(map(str, bits))
    answer = ("even", "odd")[sum(bits) % 2]
    return Problem(f"Bits: {items}\nNumber of ones:", answer, ["even", "odd"], items)


def modular(random: random.Random, length: int, turn: int, letters: int) -> Problem:
    """Draw a problem: the sum of digits modulo 5."""
    digits = [random.randrange(MODULUS) for _ in range(length)]
    position = random.randrange(length)
    digits[position] = (digits[position] + turn - sum(digits)) % MODULUS
    items = " ".join(map(str, digits))
    question = f"Digits: {items}\nSum modulo {MODULUS}:"
    return Problem(question, str(sum(digits) % MODULUS), list(map(str, range(MODULUS))), items)


def permutation(random: random.Random, length: int, turn: int, letters: int) -> Problem:
    """Draw a problem: the order of letters after swaps of two positions."""
    names = "ABCDEFGH"[:letters]
    order = list(names)
    swaps = []
    for _ in range(length):
        i, j = random.sample(range(letters), 2)
        order[i], order[j] = order[j], order[i]
        swaps.append(f"swap {i + 1} {j + 1}")
    answer = " ".join(order)
    # one order for each first letter, so that the first token decides
    candidates = [answer if n == order[0] else _beginning(random, n, names) for n in names]
    items = ", ".join(swaps)
    question = f"Start: {' '.join(names)}\nSteps: {items}\nEnd:"
    return Problem(question, answer, candidates, items)


def _beginning(random: random.Random, first: str, names: str) -> str:
    rest = [n for n in names if n != first]
    return " ".join([first, *random.sample(rest, len(rest))])


def _counting(separator: str) -> Maker:
    def make(random: random.Random, length: int, turn: int, letters: int) -> Problem:
        most = min(length, 9)
        count = turn % (most + 1)
        row = ["a"] * count + [random.choice("bc") for _ in range(length - count)]
        random.shuffle(row)
        items = separator.join(row)
        return Problem(
            f"Letters: {items}\nNumber of a:", str(count), list(map(str, range(most + 1))), items
        )

    return make


TASKS: dict[str, Maker] = {
    "parity": parity,
    "modular": modular,
    "permutation": permutation,
    "counting_separated": _counting(" "),
    "counting_merged": _counting(""),
}
