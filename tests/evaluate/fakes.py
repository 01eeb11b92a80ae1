"""Models whose answers are known: what is planted in them, measures have to find."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from reroll.evaluate.measure import Bench
from reroll.evaluate.runner import Runner
from reroll.evaluate.subjects import Subject
from reroll.evaluate.tokenizing import plain_ids
from reroll.rewrite.analysis.samples import sample_text
from tests import tiny

SURE = 20.0


class FakeForCausalLM(nn.Module):
    """Finds one token likeliest at each position: what `rule` says of the tokens up to there."""

    main_input_name = "input_ids"

    def __init__(self, rule: Callable[[list[int]], int | None], sure: float = SURE) -> None:
        super().__init__()
        self.rule = rule
        self.sure = sure
        self.config = SimpleNamespace(vocab_size=tiny.WORDS)

    def can_generate(self) -> bool:
        return True

    def forward(self, input_ids: Tensor, logits_to_keep: Tensor | int = 0) -> dict[str, Tensor]:
        positions = torch.arange(input_ids.shape[1])
        positions = (
            positions[-logits_to_keep:]
            if isinstance(logits_to_keep, int)
            else positions[logits_to_keep]
        )
        logits = torch.zeros(len(input_ids), len(positions), tiny.WORDS)
        for row, ids in enumerate(input_ids.tolist()):
            for place, position in enumerate(positions.tolist()):
                token = self.rule(ids[: position + 1])
                if token is not None:
                    logits[row, place, token] = self.sure
        return {"logits": logits}


def runner(model: Any, **options: Any) -> Runner:
    """A runner of any model, with the tiny models' tokenizer."""
    subject = Subject(type(model).__name__, model, None, False)
    subject.__dict__["tokenizer"] = tiny.tokenizer(prefix=True)
    return Runner(subject, **options)


def bench(model: Any, original: Any | None = None, text: str | None = None) -> Bench:
    other = None if original is None else runner(original)
    return Bench(runner(model), other, sample_text() if text is None else text)


def uniform() -> FakeForCausalLM:
    """Finds everything equally likely."""
    return FakeForCausalLM(lambda ids: None)


def copier(window: int | None = None) -> FakeForCausalLM:
    """Says again what stood behind the longest stretch like the last, if that is in the window."""

    def rule(ids: list[int]) -> int | None:
        last = len(ids) - 1
        best, found = 0, None
        for place in range(last):
            if window is not None and last - (place + 1) >= window:
                continue
            length = 0
            while length <= place and ids[place - length] == ids[last - length]:
                length += 1
            if length and length >= best:
                best, found = length, ids[place + 1]
        return found

    return FakeForCausalLM(rule)


def cycle(length: int, start: int = 40) -> FakeForCausalLM:
    """Says `length` tokens over and over."""
    return FakeForCausalLM(lambda ids: start + (ids[-1] - start + 1) % length)


def solver() -> FakeForCausalLM:
    """Reads the last question of a text and gives its answer, worked out from the text alone."""
    tokenizer = tiny.tokenizer(prefix=True)

    def rule(ids: list[int]) -> int | None:
        text = tokenizer.decode(ids[1:])
        for pattern, solve in SOLVERS.items():
            matches = list(re.finditer(pattern, text))
            if matches:
                end = matches[-1].end()
                whole = [ids[0], *plain_ids(tokenizer, f"{text[:end]} {solve(matches[-1])}")]
                return whole[len(ids)] if whole[: len(ids)] == ids != whole else None
        return None

    return FakeForCausalLM(rule)


def _swapped(match: re.Match[str]) -> str:
    order = match[1].split()
    for step in match[2].split(", "):
        _, i, j = step.split()
        a, b = int(i) - 1, int(j) - 1
        order[a], order[b] = order[b], order[a]
    return " ".join(order)


def _listops(match: re.Match[str]) -> int:
    """The value of a ListOps expression, read from left to right with a stack."""
    stack: list[Any] = []
    for word in match[1].split():
        if word == "]":
            values = []
            while not isinstance(stack[-1], str):
                values.append(stack.pop())
            ordered = sorted(values)
            below, above = ordered[(len(values) - 1) // 2], ordered[len(values) // 2]
            results = {
                "[MIN": ordered[0],
                "[MAX": ordered[-1],
                "[SM": sum(values) % 10,
                "[MED": (below + above) // 2,
            }
            stack.append(results[stack.pop()])
        else:
            stack.append(word if word.startswith("[") else int(word))
    (value,) = stack
    return int(value)


SOLVERS: dict[str, Callable[[re.Match[str]], Any]] = {
    r"Bits: ([01 ]+)\nNumber of ones:": lambda m: ["even", "odd"][m[1].count("1") % 2],
    r"Digits: ([0-9 ]+)\nSum modulo 5:": lambda m: sum(map(int, m[1].split())) % 5,
    r"Start: ([A-H ]+)\nSteps: ([a-z0-9, ]+)\nEnd:": _swapped,
    r"Letters: ([a-c ]+)\nNumber of a:": lambda m: m[1].count("a"),
    r"(?m)^(\[.*\]) =": _listops,
}
