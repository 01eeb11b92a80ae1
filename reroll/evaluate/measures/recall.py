"""Recall: retrieve information that is far back in the context.

- `needle`: a sentence with a secret word within the text, at a depth (0 first, 1 last), in a
  context of a given length. The context ends with the same sentence up to the word. After "needle
  in a haystack" (Kamradt, 2023; NIAH in RULER, Hsieh et al., 2024, arXiv 2404.06654).
- `passkey`: five digits within meaningless filler (Mohtashami and Jaggi, 2023, arXiv 2305.16300).
- `mqar`: multi-query associative recall (Arora et al., 2023, arXiv 2312.04927): pairs of random
  words, then every first word again in random order, each followed by its second.
- `phonebook`: names with numbers, two of the lines again as examples, then one of the other names
  (Jelassi et al., 2024, arXiv 2402.01032).

`accuracy` is the choice between the candidates (16 words, 10 keys, the values of all pairs, up to
10 numbers of the book) by their first token. `exact` is whether greedy decoding gives the whole
answer.

`distance` is the number of tokens between the answer's first token in the context and the token
from which it must be predicted. Distances below the window are `inside`, all others `beyond`. The
window is the rewritten model's, for both sides; for a model that sees all tokens, nothing is
beyond.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar

from reroll.bounds import COUNT, COUNT_OR_NONE, SHARE
from reroll.errors import UsageError
from reroll.evaluate.answers import Answer, Question, ask, cell, mean
from reroll.evaluate.measure import Bench, Measure, NotApplicable, within
from reroll.evaluate.measures import recall_tasks as tasks
from reroll.evaluate.runner import Runner
from reroll.rewrite.pipeline.options import option

TASKS = ("needle", "passkey", "mqar", "phonebook")


@dataclass(frozen=True)
class _Result:
    """One answer, with its cell and its distance."""

    cell: tuple[tuple[str, Any], ...]
    distance: int
    answer: Answer
    chance: float


class Recall(Measure):
    """Needle and passkey at depth x length, associative recall, phone book."""

    name = "recall"
    full: ClassVar[Mapping[str, Any]] = {
        "lengths": [256, 512, 1024, 2048, 4096],
        "depths": [0.0, 0.25, 0.5, 0.75, 1.0],
        "pairs": [8, 32, 128],
        "entries": [16, 64, 256],
        "samples": 8,
    }

    tasks: list[str] = option(list(TASKS), help=f"which of {', '.join(TASKS)}")
    lengths: list[int] = option(
        [256, 1024], within=COUNT, help="needle and passkey: tokens in context"
    )
    depths: list[float] = option(
        [0.0, 0.5, 0.9], within=SHARE, help="needle and passkey: where, from 0 to 1"
    )
    pairs: list[int] = option([8, 32], within=COUNT, help="mqar: how many pairs")
    entries: list[int] = option([16, 64], within=COUNT, help="phonebook: how many names")
    samples: int = option(4, within=COUNT, help="questions for each cell")
    window: int = option(
        0, within=COUNT_OR_NONE, help="what counts as inside; 0 for the model's own window"
    )

    def check(self) -> None:
        unknown = [t for t in self.tasks if t not in TASKS]
        if unknown:
            raise UsageError(f"there is no task {unknown[0]!r}", self.name, f"{', '.join(TASKS)}")

    def run(self, bench: Bench) -> dict[str, Any]:
        bench.model.need_generation()
        window = self.window or bench.model.window
        result: dict[str, Any] = {"window": window}
        for side, runner in bench.sides.items():
            result[side] = {}
            for task in self.tasks:
                results = self._mqar(bench, runner, side) if task == "mqar" else []
                for questions, coordinates in self._questions(bench, runner, task):

                    def tell(done: int, text: str = f"{side}, {task} {coordinates}") -> None:
                        bench.progress(0, 0, f"{text}: {done}")

                    results += _asked(runner, questions, coordinates, tell)
                if results:
                    result[side][task] = _summary(results, window)
        if not result["model"]:
            raise NotApplicable("no length fits into the model's context")
        return result

    def headline(self, result: Mapping[str, Any]) -> dict[str, float | int | None]:
        rows: dict[str, float | int | None] = {}
        for task, each in result.items():
            rows[f"{task} (chance {each['chance']:.2f})"] = each["accuracy"]
            if each["beyond"] is not None:
                rows[f"{task}, beyond the window"] = each["beyond"]
            rows[f"{task}, exact"] = each["exact"]
        return rows

    def _questions(
        self, bench: Bench, runner: Runner, task: str
    ) -> list[tuple[list[tuple[Question, int]], dict[str, Any]]]:
        """Return questions with the distances of their answers, and the cell of each group."""
        groups: list[tuple[list[tuple[Question, int]], dict[str, Any]]] = []
        if task in ("needle", "passkey"):
            make = tasks.needle if task == "needle" else tasks.passkey
            for length, depth in product(within(self.lengths, runner), self.depths):
                made = [make(bench, runner, length, depth, n) for n in range(self.samples)]
                fitting = [question for question in made if question is not None]
                groups.append((fitting, {"length": length, "depth": depth}))
        elif task == "phonebook":
            for count in self.entries:
                book = [tasks.phonebook(bench, runner, count, n) for n in range(self.samples)]
                groups.append((book, {"entries": count}))
        return groups

    def _mqar(self, bench: Bench, runner: Runner, side: str) -> list[_Result]:
        results = []
        for pairs in self.pairs:
            bench.progress(0, 0, f"{side}, mqar, {pairs} pairs")
            for answer, distance in tasks.mqar(bench, runner, pairs, self.samples):
                results.append(_Result((("pairs", pairs),), distance, answer, 1 / pairs))
        return results


def _asked(
    runner: Runner,
    questions: Sequence[tuple[Question, int]],
    coordinates: dict[str, Any],
    tell: Any,
) -> list[_Result]:
    if any(runner.limit and q.length > runner.limit for q, _ in questions):
        return []
    answers = ask(runner, [question for question, _ in questions], tell)
    return [
        _Result(tuple(coordinates.items()), distance, answer, 1 / len(question.candidates))
        for (question, distance), answer in zip(questions, answers, strict=True)
    ]


def _summary(results: Sequence[_Result], window: int | None) -> dict[str, Any]:
    """Summarise one task as JSON data: over all, inside and beyond the window, and by cell."""
    inside = [r.answer for r in results if window is None or r.distance < window]
    beyond = [r.answer for r in results if window is not None and r.distance >= window]
    cells = []
    for coordinates in dict.fromkeys(r.cell for r in results):
        in_cell = [r for r in results if r.cell == coordinates]
        distances = [r.distance for r in in_cell]
        cells.append(
            cell(
                [r.answer for r in in_cell],
                _mean([r.chance for r in in_cell]),
                **dict(coordinates),
                distance=round(_mean(distances)),
            )
        )
    return {
        "accuracy": _mean([r.answer.chosen for r in results]),
        "exact": _mean([r.answer.exact for r in results]),
        "chance": _mean([r.chance for r in results]),
        "inside": mean([a.chosen for a in inside]),
        "beyond": mean([a.chosen for a in beyond]),
        "inside_exact": mean([a.exact for a in inside]),
        "beyond_exact": mean([a.exact for a in beyond]),
        "cells": cells,
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
