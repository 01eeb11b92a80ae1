"""Fit the classifiers of exits on the hidden states of a model at full depth."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reroll.bounds import COUNT, NOT_NEGATIVE, check_number
from reroll.errors import UsageError
from reroll.evaluate.exits import LENGTH, exit_trips, need_exits
from reroll.passes.exits import classifiers
from reroll.rewrite.ir.exits import exit_loop, is_open
from reroll.runtime.functions.loops import read_out


@dataclass(frozen=True)
class ExitStates:
    """Data to fit classifiers on, by trip.

    `states` are hidden states at unit RMS, row by row [time, width]. `labels` [tokens] say whether
    the prediction at the exit was that at full depth.
    """

    states: dict[int, list[Tensor]]
    labels: dict[int, Tensor]


def exit_states(model: Any, tokens: Tensor | Sequence[int]) -> ExitStates:
    """Compute the hidden states of `tokens` [n] at a lowered model's exits, in rows of 256 tokens.

    The model runs at full depth. A label says whether the exit's norm and head predict the same
    token as the full depth. The states serve for all models that differ in their classifiers only.
    Raises UsageError for a model without exits, or with a threshold below infinity.
    """
    _, exits = need_exits(model.program)
    if any(map(is_open, exits.thresholds)):
        raise UsageError(
            "the model's exits are open, and states of the full depth are needed",
            hint="fit before thresholds are set: insert_exits leaves them infinite",
        )
    trips = exit_trips(model.program, exits)
    tokens = torch.as_tensor(tokens, dtype=torch.long)
    rows = [r for r in torch.split(tokens, LENGTH) if len(r) > 1]
    states: dict[int, list[Tensor]] = {trip: [] for trip in trips}
    labels: dict[int, list[Tensor]] = {trip: [] for trip in trips}
    with torch.no_grad():
        for row in rows:
            carried: dict[int, Tensor] = {}
            with _recorded(model, trips, carried):
                out = model(row[None], use_cache=False)
            last = out.logits[0].argmax(-1)
            for trip in trips:
                hidden = carried[trip]
                states[trip].append(F.rms_norm(hidden[0].float(), hidden.shape[-1:], eps=1e-6))
                early = read_out(model, hidden, trip + 1, input_ids=row[None], use_cache=False)
                labels[trip].append(early[0].argmax(-1) == last)
    return ExitStates(states, {trip: torch.cat(each) for trip, each in labels.items()})


@contextmanager
def _recorded(model: Any, trips: Iterable[int], carried: dict[int, Tensor]) -> Iterator[None]:
    """Record the hidden states that these trips return, by trip, while the block runs."""
    modules = model._assembly.loops[model.program.loops[-1].name].modules
    handles = [
        modules[trip].register_forward_hook(
            lambda _module, _args, out, trip=trip: carried.__setitem__(trip, out[0])
        )
        for trip in trips
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def fit_exits(
    model: Any,
    tokens: Tensor | Sequence[int] | ExitStates,
    *,
    steps: int = 300,
    decay: float = 1e-3,
) -> dict[int, float]:
    """Fit the classifiers of `insert_exits` by logistic regression; returns accuracy by exit.

    The data are the states of `tokens` [n], or those that `exit_states` returned; `gated` reads the
    tokens of each row in order. The weights of `model`, a lowered model, change in place;
    `model.save_pretrained` or `model.to_program()` keeps them. Raises UsageError for a model whose
    exits have no classifiers, or have a threshold below infinity.
    """
    check_number("steps", steps, COUNT, "fit_exits")
    check_number("decay", decay, NOT_NEGATIVE, "fit_exits", integer=False)
    loop_and_exits = exit_loop(model.program)
    if loop_and_exits is None or not any(".exit.score.weight" in n for n in model.program.weights):
        raise UsageError(
            "the model's exits have no classifiers",
            hint="convert it with insert_exits(criterion=linear), (criterion=mlp) or gated",
        )
    data = tokens if isinstance(tokens, ExitStates) else exit_states(model, tokens)
    modules = model._assembly.loops[loop_and_exits[0].name].modules
    accuracy = {}
    for trip, rows in data.states.items():
        weights = dict(modules[trip].get_submodule("exit").named_parameters())
        y = data.labels[trip].float()
        accuracy[trip + 1] = _fitted(weights, _batches(rows), y, steps, decay)
    return accuracy


def _batches(rows: list[Tensor]) -> list[Tensor]:
    """Stack rows [time, width] of the first row's length; others stay alone."""
    whole = [r for r in rows if len(r) == len(rows[0])]
    return [torch.stack(whole), *(r[None] for r in rows[len(whole) :])]


def _fitted(
    weights: dict[str, Tensor], batches: list[Tensor], y: Tensor, steps: int, decay: float
) -> float:
    def logits() -> Tensor:
        return torch.cat([classifiers.logits(weights, x).flatten() for x in batches])

    optimizer = torch.optim.Adam(list(weights.values()), lr=1e-2, weight_decay=decay)
    with torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(logits(), y).backward()
            optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        return ((logits() > 0) == y.bool()).float().mean().item()
