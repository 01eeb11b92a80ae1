"""A measure of multiple choice from texts that ship: `--load benchmarks/questions.py`.

`continuation` asks which of four passages follows one, `definition` which of four definitions is a
word's. The answer is the candidate with the highest mean log-likelihood, so guessing gives 0.25.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from reroll.bounds import COUNT
from reroll.evaluate.answers import Question, ask
from reroll.evaluate.measure import Bench, Measure
from reroll.evaluate.runner import Runner
from reroll.rewrite.pipeline.options import option

CONTEXT, ANSWER = 48, 16
WIKI, DICTIONARY = Path("data/text/wiki.val.txt"), Path("data/text/foldoc.val.txt")


class Questions(Measure):
    """The share of right answers to questions about passages and words."""

    name = "questions"
    full: ClassVar[Mapping[str, Any]] = {"items": 200}

    items: int = option(40, within=COUNT, help="questions of each task")

    def run(self, bench: Bench) -> dict[str, Any]:
        """Ask the same questions of each side."""
        return {side: self._of(runner) for side, runner in bench.sides.items()}

    def headline(self, found: Mapping[str, Any]) -> dict[str, float | int | None]:
        """One share for each task."""
        return {task: found[task] for task in ("continuation", "definition")}

    def _of(self, runner: Runner) -> dict[str, float]:
        runner.need_generation()
        shares = {}
        for task, pairs in (("continuation", _passages(runner)), ("definition", _words(runner))):
            answers = ask(runner, _questions(pairs, self.items))
            shares[task] = sum(answer.chosen for answer in answers) / len(answers)
        return shares


def _encode(runner: Runner, text: str) -> list[int]:
    return list(runner.tokenizer.encode(text, add_special_tokens=False))


def _passages(runner: Runner) -> list[tuple[list[int], list[int]]]:
    ids = _encode(runner, WIKI.read_text(encoding="utf-8")[:400_000])
    size = CONTEXT + ANSWER
    starts = range(0, len(ids) - size, 4 * size)
    return [(ids[s : s + CONTEXT], ids[s + CONTEXT : s + size]) for s in starts]


def _words(runner: Runner) -> list[tuple[list[int], list[int]]]:
    text = DICTIONARY.read_text(encoding="utf-8")
    entries = re.findall(r"(?m)^(\S[^\n]{1,40})\n+\s+(\S[^\n]{40,})", text)
    pairs = (
        (_encode(runner, f"{word}:"), _encode(runner, f" {definition}")[:ANSWER])
        for word, definition in entries
    )
    return [pair for pair in pairs if len(pair[1]) == ANSWER]


def _questions(pairs: list[tuple[list[int], list[int]]], count: int) -> list[Question]:
    """Each prompt with its own continuation and those of three others."""
    chosen = random.Random(0)
    questions = []
    for number, (prompt, truth) in enumerate(pairs[:count]):
        others = [pair[1] for i, pair in enumerate(pairs) if i != number]
        candidates = chosen.sample(others, 3)
        index = chosen.randrange(4)
        candidates.insert(index, truth)
        questions.append(Question(prompt, candidates, index))
    return questions
