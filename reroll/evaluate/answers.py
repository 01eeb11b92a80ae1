"""Questions to a language model, and how well it answers: many in a batch, in one forward each.

A question is a prompt and candidates, one of which is right. Two things are scored:

- `chosen`: whether the right candidate is likelier than the others, decided by its first token
  where the candidates' first tokens differ, else by the mean log-likelihood of its tokens.
- `exact`: whether greedy decoding would give the right candidate: each of its tokens is the
  likeliest of all, given those before it.

Among equally likely tokens the credit is shared, so a uniform model scores exactly chance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from reroll.evaluate.runner import Runner
from reroll.evaluate.tokenizing import plain_ids

# rows and tokens of one batch
ROWS = 16
TOKENS = 4096


@dataclass(frozen=True)
class Question:
    """A prompt, the candidates for what follows it, and which of them is right."""

    prompt: list[int]
    candidates: list[list[int]]
    truth: int = 0

    @property
    def length(self) -> int:
        """Tokens of the prompt and the longest candidate."""
        return len(self.prompt) + max(map(len, self.candidates))


@dataclass(frozen=True)
class Answer:
    """`chosen` and `exact` are from 0 to 1, `log_likelihood` is of the right candidate in nats."""

    chosen: float
    exact: float
    log_likelihood: float


@dataclass(frozen=True)
class Spot:
    """A position of a row whose next token is known; `others` are tokens that it competes with."""

    position: int
    target: int
    others: tuple[int, ...] = ()


@dataclass(frozen=True)
class Seen:
    """What the model gives at a spot: credit among all tokens and among the others, in nats."""

    exact: float
    chosen: float
    log_likelihood: float


@dataclass(frozen=True)
class Row:
    """Token ids and the spots in them."""

    ids: list[int]
    spots: list[Spot] = field(default_factory=list)


def encode(runner: Runner, prompt: str, candidates: Sequence[str], truth: int) -> Question:
    """A question as token ids; tokens that all candidates begin with become part of the prompt.

    The prompt and each candidate are tokenized as one text.
    """
    wholes = [plain_ids(runner.tokenizer, prompt + c) for c in candidates]
    shared = 0
    if len(wholes) == 1:
        alone = plain_ids(runner.tokenizer, prompt)
        wholes.append(alone)
    shortest = min(map(len, wholes))
    while shared < shortest and len({w[shared] for w in wholes}) == 1:
        shared += 1
    # the right candidate always has a token of its own to be scored by
    shared = min(shared, min(len(w) for w in wholes[: len(candidates)]) - 1)
    prompt_ids = runner.prefix + wholes[0][:shared]
    return Question(prompt_ids, [w[shared:] for w in wholes[: len(candidates)]], truth)


def ask(
    runner: Runner,
    questions: Sequence[Question],
    on_batch: Callable[[int], None] = lambda done: None,
) -> list[Answer]:
    """The answers to some questions, in their order; `on_batch` is told how many rows are done."""
    rows: list[Row] = []
    spans: list[tuple[int, int, bool]] = []
    for question in questions:
        own, by_first = _rows(question)
        spans.append((len(rows), len(rows) + len(own), by_first))
        rows += own
    seen = look(runner, rows, on_batch)
    return [
        _answer(question, seen[start:end], by_first)
        for question, (start, end, by_first) in zip(questions, spans, strict=True)
    ]


def _rows(question: Question) -> tuple[list[Row], bool]:
    """The rows of one question, the right candidate's first; and whether first tokens decide."""
    prompt = question.prompt
    order = [question.truth, *(i for i in range(len(question.candidates)) if i != question.truth)]
    firsts = tuple(c[0] for c in question.candidates)
    by_first = len(set(firsts)) == len(firsts)
    rows = []
    for number in order[:1] if by_first else order:
        ids = prompt + question.candidates[number]
        spots = [
            Spot(p - 1, ids[p], firsts if by_first and p == len(prompt) else ())
            for p in range(len(prompt), len(ids))
        ]
        rows.append(Row(ids, spots))
    return rows, by_first


def _answer(question: Question, seen: list[list[Seen]], by_first: bool) -> Answer:
    right = seen[0]
    exact = 1.0
    for spot in right:
        exact *= spot.exact
    likelihoods = [sum(s.log_likelihood for s in row) for row in seen]
    if by_first:
        chosen = right[0].chosen
    else:
        means = [x / len(row) for x, row in zip(likelihoods, seen, strict=True)]
        values = torch.tensor(means, dtype=torch.float64)
        # rounding is no reason to prefer one of two equally likely candidates
        best = values >= values.max() - 1e-6 * values.abs().max()
        chosen = float(best[0]) / int(best.sum())
    return Answer(chosen, exact, likelihoods[0])


def look(
    runner: Runner, rows: Sequence[Row], on_batch: Callable[[int], None] = lambda done: None
) -> list[list[Seen]]:
    """What the model gives at the spots of some rows, in their order."""
    found: list[list[Seen]] = [[] for _ in rows]
    done = 0
    for batch in _batches(rows):
        longest = max(len(rows[n].ids) for n in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        for place, number in enumerate(batch):
            ids[place, : len(rows[number].ids)] = torch.tensor(rows[number].ids)
        wanted = sorted({s.position for n in batch for s in rows[n].spots})
        for positions, logits in runner.logits(ids, wanted):
            index = {int(p): i for i, p in enumerate(positions)}
            for place, number in enumerate(batch):
                spots = [s for s in rows[number].spots if s.position in index]
                chosen = logits[place, [index[s.position] for s in spots]]
                found[number] += [_seen(v, s) for v, s in zip(chosen, spots, strict=True)]
        done += len(batch)
        on_batch(done)
    return found


def _batches(rows: Sequence[Row]) -> Iterator[list[int]]:
    """Numbers of rows of about the same length, longest first, within the limits of a batch."""
    order = sorted(range(len(rows)), key=lambda n: -len(rows[n].ids))
    start = 0
    while start < len(order):
        count = min(max(TOKENS // len(rows[order[start]].ids), 1), ROWS)
        yield order[start : start + count]
        start += count


def _seen(logits: Tensor, spot: Spot) -> Seen:
    """`logits` is [vocabulary]."""
    logits = logits.float()
    value = logits[spot.target]
    others = logits[list(spot.others)] if spot.others else logits
    log_likelihood = float(value - logits.logsumexp(0))
    return Seen(_credit(value, logits), _credit(value, others), log_likelihood)


def _credit(value: Tensor, among: Tensor) -> float:
    """1 if a value is the only largest one, a share of it if others are as large, else 0."""
    return 1 / int((among == value).sum()) if bool(value >= among.max()) else 0.0


def mean(values: Sequence[float]) -> float | None:
    """The mean; None of nothing."""
    return sum(values) / len(values) if values else None


def cell(answers: Sequence[Answer], chance: float, **place: Any) -> dict[str, Any]:
    """Answers of one kind as JSON data: `place` says which."""
    return {
        **place,
        "accuracy": mean([a.chosen for a in answers]),
        "exact": mean([a.exact for a in answers]),
        "chance": chance,
        "samples": len(answers),
    }
