"""Calibrate the thresholds of exits so that a risk bound holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from reroll.bounds import BETWEEN, check_number
from reroll.errors import UsageError
from reroll.rewrite.analysis.reach import longest
from reroll.rewrite.ir.exits import Exits, exit_loop, is_open, with_thresholds
from reroll.rewrite.ir.interpret import materialise, run
from reroll.rewrite.ir.program import Loop, Program
from reroll.rewrite.ir.records import Step

LENGTH = 256
# a finite threshold that no score exceeds
NEVER = 1e30
LEVELS = (0.99, 0.98, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)


@dataclass(frozen=True)
class Calibration:
    """Result of `calibrate`.

    Attributes:
        thresholds: by the number of trips after which a token may leave; None where none is safe.
        level: the part of the tokens at each exit whose score is not above its threshold.
        risk: the bound, and `observed` the part of the tokens whose prediction changed.
        confidence: the confidence with which the bound holds, for tokens like those of the text.
        depth: the mean number of trips, of `trips`.
    """

    thresholds: dict[int, float] | None
    level: float
    risk: float
    observed: float
    p_value: float
    confidence: float
    depth: float
    trips: int
    tokens: int
    tried: tuple[dict[str, float], ...]

    def as_data(self) -> dict[str, Any]:
        """Return the result as JSON data."""
        return asdict(self)


def p_value(errors: int, count: int, risk: float) -> float:
    """Bound the probability of so few errors if the true rate is above `risk`.

    The bounds are those of Hoeffding and Bentkus: Learn then Test (arXiv 2110.01052), proposition
    3, for losses of 0 and 1.
    """
    rate = errors / count
    if rate >= risk:
        return 1.0
    entropy = rate * math.log(rate / risk) if rate else 0.0
    entropy += (1 - rate) * math.log((1 - rate) / (1 - risk))
    logs = (
        math.lgamma(count + 1)
        - math.lgamma(k + 1)
        - math.lgamma(count - k + 1)
        + k * math.log(risk)
        + (count - k) * math.log(1 - risk)
        for k in range(errors + 1)
    )
    tail = math.fsum(math.exp(value) for value in logs)
    return min(1.0, math.exp(-count * entropy), math.e * tail)


def calibrate(
    program: Program,
    tokens: Tensor | Sequence[int],
    *,
    risk: float = 0.05,
    confidence: float = 0.95,
    levels: Sequence[float] = LEVELS,
    progress: Callable[[int, int, str], None] | None = None,
) -> tuple[Program, Calibration]:
    """Choose thresholds so that at most a part `risk` of tokens differ from the full depth.

    Learn then Test with fixed sequences, as in CALM (arXiv 2207.07061). It tests one sequence of
    thresholds, from the highest downwards, and stops at the first whose risk is not shown to be
    below the bound. The last one before it is chosen. A level is the same quantile of the scores at
    every exit.

    Every token is run with the caches of the tokens that left before it, as in generation. The
    confidence is for independent tokens from the distribution of the text. Tokens of a text depend
    on each other, so give it much text.

    `tokens` [n] are of the calibration text: the first quarter sets quantiles, the rest tests them.
    Raises UsageError if the program has no exits, or the text has too few tokens.
    """
    check_number("risk", risk, BETWEEN, "calibrate", integer=False)
    check_number("confidence", confidence, BETWEEN, "calibrate", integer=False)
    loop, exits = need_exits(program)
    tokens = torch.as_tensor(tokens, dtype=torch.long)
    length = min(LENGTH, longest(program) or LENGTH)
    rows = [r for r in torch.split(tokens, length) if len(r) == length]
    if len(rows) < 2:
        raise UsageError(
            f"{len(tokens)} tokens are too few to calibrate on", hint=f"give {4 * length} or more"
        )
    at = exit_trips(program, exits)
    split = max(1, len(rows) // 4)
    scores = scores_at(program, exits, at, rows[:split])
    rows = rows[split:]
    full = closed(program).to_module()
    expected = [predicted(full, row)[0] for row in rows]
    del full
    best: tuple[float, dict[int, float], float, float, float] | None = None
    tried = []
    for number, level in enumerate(levels):
        if progress is not None:
            progress(number, len(levels), "thresholds")
        chosen = {trip: scores[trip].quantile(level).item() for trip in at}
        model = with_open(program, chosen).to_module()
        answers = [predicted(model, row) for row in rows]
        del model
        errors = sum(int((a != e).sum()) for (a, _), e in zip(answers, expected, strict=True))
        count = sum(len(e) for e in expected)
        depth = torch.cat([d for _, d in answers]).float().mean().item()
        chance = p_value(errors, count, risk)
        tried.append({"level": level, "observed": errors / count, "p": chance, "depth": depth})
        if chance > 1 - confidence:
            break
        best = level, chosen, errors / count, chance, depth
    count = sum(len(e) for e in expected)
    if best is None:
        best = 1.0, dict.fromkeys(at, math.inf), 0.0, 0.0, float(loop.trips)
    level, chosen, observed, chance, depth = best
    named = {trip + 1: value for trip, value in chosen.items()}
    calibration = Calibration(
        None if level == 1.0 else named, level, risk, observed, chance, confidence, depth,
        loop.trips, count, tuple(tried),
    )  # fmt: skip
    result = with_open(program, chosen)
    remark = (
        f"at most {risk:.3g} of tokens differ from the full depth, with confidence "
        f"{confidence:.3g}: {observed:.3g} of {count} did; mean depth {depth:.4g} of {loop.trips}"
    )
    step = Step(f"calibrate(risk={risk}, confidence={confidence})", 0.0, (remark,))
    origin = replace(result.origin, steps=(*result.origin.steps, step))
    return replace(result, origin=origin), calibration


def need_exits(program: Program) -> tuple[Loop, Exits]:
    """Return the loop that tokens may leave, and its exits; raises UsageError if there are none."""
    found = exit_loop(program)
    if found is None:
        raise UsageError("the model has no exits", hint="convert it with insert_exits(at=[...])")
    return found


def exit_trips(program: Program, exits: Exits) -> list[int]:
    """Return the trips after which tokens may leave, also where all thresholds are infinite."""
    opened = [trip for trip, value in enumerate(exits.thresholds) if is_open(value)]
    if opened:
        return opened
    from reroll.rewrite.pipeline.pipeline import resolve

    for step in reversed(program.origin.steps):
        if step.text.startswith("insert_exits("):
            (each,) = resolve(step.text)
            return [stop - 1 for stop in each.at]  # type: ignore[attr-defined]
    raise UsageError("the program does not record after which trips tokens may leave")


def with_open(program: Program, thresholds: dict[int, float]) -> Program:
    """Return the program with other thresholds at its exits."""
    edited = program.edit()
    return with_thresholds(edited, need_exits(edited)[0], thresholds)


def closed(program: Program) -> Program:
    """Return the program with infinite thresholds, so that no token leaves early."""
    loop, _ = need_exits(program)
    return with_open(program, dict.fromkeys(range(loop.trips), math.inf))


def predicted(model: Any, row: Tensor) -> tuple[Tensor, Tensor]:
    """Return the most likely next tokens [n] and their depths."""
    with torch.no_grad():
        out = model(row[None], use_cache=False)
    return out.logits[0].argmax(-1), out.depth[0]


def scores_at(
    program: Program, exits: Exits, at: Sequence[int], rows: Sequence[Tensor]
) -> dict[int, Tensor]:
    """Compute the scores of tokens at each exit, at full depth."""
    opened = with_open(program, dict.fromkeys(at, NEVER))
    target = need_exits(opened)[1].node.args[1]
    scores: dict[int, list[Tensor]] = {trip: [] for trip in at}

    def observe(name: str, trip: int | None, node: Any, args: Any, result: Any) -> None:
        if node is target and trip in scores:
            scores[trip].append(result.float().flatten())

    weights = materialise(opened)
    name = next(i.name for i in opened.inputs if i.role == "data")
    with torch.no_grad():
        for row in rows:
            run(opened, {name: row[None]}, weights=weights, fast=True, observe=observe)
    return {trip: torch.cat(each) for trip, each in scores.items()}
