"""Ask a language model questions in batches, and score its answers with one forward each.

A question is a prompt and candidates, one of which is right. There are two scores:

- `chosen`: whether the right candidate is more likely than the others. If the candidates' first
  tokens differ, the likelihood is that of the first token, else the mean log-likelihood of all
  tokens.
- `exact`: whether greedy decoding would generate the right candidate: each of its tokens is the
  most likely one, given those before it.

Equally likely tokens share the credit, so a uniform model scores exactly chance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from reroll.evaluate.runner import Runner
from reroll.evaluate.tokenizing import plain_ids

# the most rows and tokens of one batch
ROWS = 16
TOKENS = 4096


@dataclass(frozen=True)
class Question:
    """A prompt, candidates for its continuation, and the index of the right one."""

    prompt: list[int]
    candidates: list[list[int]]
    truth: int = 0

    @property
    def length(self) -> int:
        """Number of tokens of the prompt and the longest candidate."""
        return len(self.prompt) + max(map(len, self.candidates))


@dataclass(frozen=True)
class Answer:
    """Scores of an answer from 0 to 1, and the right candidate's log-likelihood in nats.

    Of a single token, `exact` compares it with all tokens, and `chosen` with the competing ones.
    """

    chosen: float
    exact: float
    log_likelihood: float


@dataclass(frozen=True)
class Spot:
    """A position of a row, its target (the next token), and the tokens that compete with it."""

    position: int
    target: int
    others: tuple[int, ...] = ()


@dataclass(frozen=True)
class ScoredRow:
    """Token ids, and the positions in them that are scored."""

    ids: list[int]
    spots: list[Spot] = field(default_factory=list)


def encode(runner: Runner, prompt: str, candidates: Sequence[str], truth: int) -> Question:
    """Tokenize a question; leading tokens that all candidates share become part of the prompt.

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
    # every candidate keeps at least one token that can be scored
    shared = min(shared, min(len(w) for w in wholes[: len(candidates)]) - 1)
    prompt_ids = runner.prefix + wholes[0][:shared]
    return Question(prompt_ids, [w[shared:] for w in wholes[: len(candidates)]], truth)


def ask(
    runner: Runner,
    questions: Sequence[Question],
    on_batch: Callable[[int], None] = lambda done: None,
) -> list[Answer]:
    """Answer questions, in their order; `on_batch` is called with the number of finished rows."""
    rows: list[ScoredRow] = []
    spans: list[tuple[int, int, bool]] = []
    for question in questions:
        question_rows, by_first = _rows(question)
        spans.append((len(rows), len(rows) + len(question_rows), by_first))
        rows += question_rows
    scores = score_rows(runner, rows, on_batch)
    return [
        _answer(question, scores[start:end], by_first)
        for question, (start, end, by_first) in zip(questions, spans, strict=True)
    ]


def _rows(question: Question) -> tuple[list[ScoredRow], bool]:
    """Build the rows of a question, the right one first, and whether first tokens decide."""
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
        rows.append(ScoredRow(ids, spots))
    return rows, by_first


def _answer(question: Question, scores: list[list[Answer]], by_first: bool) -> Answer:
    right = scores[0]
    exact = 1.0
    for spot in right:
        exact *= spot.exact
    likelihoods = [sum(s.log_likelihood for s in row) for row in scores]
    if by_first:
        chosen = right[0].chosen
    else:
        means = [x / len(row) for x, row in zip(likelihoods, scores, strict=True)]
        values = torch.tensor(means, dtype=torch.float64)
        # a difference by rounding must not decide between equally likely candidates
        best = values >= values.max() - 1e-6 * values.abs().max()
        chosen = float(best[0]) / int(best.sum())
    return Answer(chosen, exact, likelihoods[0])


def score_rows(
    runner: Runner, rows: Sequence[ScoredRow], on_batch: Callable[[int], None] = lambda done: None
) -> list[list[Answer]]:
    """Score the targets of some rows, in their order."""
    scores: list[list[Answer]] = [[] for _ in rows]
    done = 0
    for batch in _batches(rows):
        longest = max(len(rows[n].ids) for n in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        for at, number in enumerate(batch):
            ids[at, : len(rows[number].ids)] = torch.tensor(rows[number].ids)
        wanted = sorted({s.position for n in batch for s in rows[n].spots})
        for positions, logits in runner.logits(ids, wanted):
            index = {int(p): i for i, p in enumerate(positions)}
            for at, number in enumerate(batch):
                spots = [s for s in rows[number].spots if s.position in index]
                chosen = logits[at, [index[s.position] for s in spots]]
                scores[number] += [_score(v, s) for v, s in zip(chosen, spots, strict=True)]
        done += len(batch)
        on_batch(done)
    return scores


def _batches(rows: Sequence[ScoredRow]) -> Iterator[list[int]]:
    """Group rows of similar length into batches of row numbers, longest first."""
    order = sorted(range(len(rows)), key=lambda n: -len(rows[n].ids))
    start = 0
    while start < len(order):
        count = min(max(TOKENS // len(rows[order[start]].ids), 1), ROWS)
        yield order[start : start + count]
        start += count


def _score(logits: Tensor, spot: Spot) -> Answer:
    """Score a target by the logits [vocabulary] at its position."""
    logits = logits.float()
    value = logits[spot.target]
    others = logits[list(spot.others)] if spot.others else logits
    log_likelihood = float(value - logits.logsumexp(0))
    return Answer(_credit(value, others), _credit(value, logits), log_likelihood)


def _credit(value: Tensor, among: Tensor) -> float:
    """Return 1 if a value is the only largest one, a share of 1 if others tie with it, else 0."""
    return 1 / int((among == value).sum()) if bool(value >= among.max()) else 0.0


def mean(values: Sequence[float]) -> float | None:
    """Compute the mean; None for no values."""
    return sum(values) / len(values) if values else None


def cell(answers: Sequence[Answer], chance: float, **coordinates: Any) -> dict[str, Any]:
    """Summarise the answers of one cell as JSON data; `coordinates` has the cell's coordinates."""
    return {
        **coordinates,
        "accuracy": mean([a.chosen for a in answers]),
        "exact": mean([a.exact for a in answers]),
        "chance": chance,
        "samples": len(answers),
    }
