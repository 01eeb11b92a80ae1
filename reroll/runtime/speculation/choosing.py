"""Which trips of a loop a draft can do without: scores that need no training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from reroll.runtime.functions.loops import Trips


def best_path(
    model: Any,
    loop: str,
    inputs: dict[str, Tensor],
    cache: Any,
    states: Sequence[Tensor],
    skip: int,
) -> list[int]:
    """Return the trips that run, without `skip` of them, by dynamic programming.

    CLaSp (arXiv 2505.24196). g(i, j) is the state behind trip i with j trips left out: either
    g(i - 1, j - 1) as it is, or what trip i makes of g(i - 1, j), whichever has the larger cosine
    to the model's own state there. That is not always the best set, because only one of both is
    kept. `inputs` are those of the model's forward, with one row, and `cache` its state before
    them. `states` [time, width] are the model's own, before each trip and after the last; cosines
    are means over the tokens. All j are one batch.
    """
    trips = model._assembly.loops[loop]
    rows = skip + 1
    choosing = _Choosing(states, rows)
    modules = [_Step(each, choosing) for each in trips.modules]
    replaced = Trips(modules, trips.first_layer, trips.layers_per_trip)
    batch = {name: value.expand(rows, *value.shape[1:]) for name, value in inputs.items()}
    with _instead(model, loop, replaced):
        model.run_function(model._assembly.backbone, batch, cache)
    return choosing.path(skip)


def least_influence(states: Sequence[Tensor], skip: int) -> list[int]:
    """Return the trips that run: all but those with the largest cosine of input and output.

    ShortGPT (arXiv 2403.03853). `states` [time, width] are those before each trip and after the
    last.
    """
    alike = [
        torch.cosine_similarity(a.float(), b.float(), dim=-1).mean().item()
        for a, b in pairwise(states)
    ]
    order = sorted(range(len(alike)), key=alike.__getitem__)
    return sorted(order[: len(alike) - skip])


def by_agreement(model: Any, loop: str, inputs: dict[str, Tensor], skip: int) -> list[int]:
    """Return the trips that run, without the `skip` that change the likeliest tokens least.

    One after the other is left out, the one without which most tokens stay those of the whole
    model: the model runs for each trip that is left, each time.
    """
    trips = model._assembly.loops[loop]

    def likeliest(run: Sequence[int]) -> Tensor:
        with trips.running(run):
            logits: Tensor = model(**inputs, use_cache=False).logits
        return logits.argmax(-1)

    run = list(range(len(trips.modules)))
    wanted = likeliest(run)
    for _ in range(skip):
        tried = [[trip for trip in run if trip != out] for out in run]
        run = max(tried, key=lambda each: int((likeliest(each) == wanted).sum()))
    return run


class _Choosing:
    """The choices of the dynamic programme: for each trip, the rows that leave it out."""

    def __init__(self, states: Sequence[Tensor], rows: int) -> None:
        self.states, self.rows = states, rows
        self.left_out: list[Tensor] = []

    def step(self, before: Tensor, ran: Tensor) -> Tensor:
        """Choose for each number of trips left out, from states [rows, time, width]."""
        done = len(self.left_out)
        wanted = self.states[done + 1].float()
        as_it_is = before.roll(1, 0)
        number = torch.arange(self.rows, device=ran.device)
        run, left = (
            torch.cosine_similarity(each.float(), wanted, dim=-1).mean(-1)
            for each in (ran, as_it_is)
        )
        # no more can be left out than there are trips
        run = run.masked_fill(number > done, -torch.inf)
        left = left.masked_fill((number == 0) | (number > done + 1), -torch.inf)
        out = left > run
        self.left_out.append(out)
        return torch.where(out[:, None, None], as_it_is, ran)

    def path(self, skip: int) -> list[int]:
        """Return the trips that run where `skip` are left out."""
        run, left = [], skip
        for trip in reversed(range(len(self.left_out))):
            if bool(self.left_out[trip][left]):
                left -= 1
            else:
                run.append(trip)
        return run[::-1]


class _Step(nn.Module):
    """A trip that runs or is left out, row by row."""

    def __init__(self, trip: nn.Module, choosing: _Choosing) -> None:
        super().__init__()
        # a list, so that the trip does not get another parent
        self.trip, self.choosing = [trip], choosing

    def forward(self, carry: Tensor, *values: Any, past_key_values: Any = None) -> tuple[Any, ...]:
        (ran,) = self.trip[0](carry, *values, past_key_values=past_key_values)
        return (self.choosing.step(carry, ran),)


@contextmanager
def _instead(model: Any, loop: str, trips: Trips) -> Iterator[None]:
    loops = model._assembly.loops
    kept = loops[loop]
    loops[loop] = trips
    try:
        yield
    finally:
        loops[loop] = kept


# ---- the model's keys and values, for rows that read them and add none


class _Read:
    """A cache layer of the model as rows of new tokens see it, whose own keys it has already."""

    is_compileable = False
    is_initialized = True

    def __init__(self, layer: Any, length: int, new: int) -> None:
        self.keys, self.values = layer.keys, layer.values
        self.length, self.new = length, new

    def get_seq_length(self) -> int:
        return self.length - self.new

    def get_mask_sizes(self, length: int) -> tuple[int, int]:
        del length
        kept = self.keys.shape[2]
        return kept, self.length - kept

    def update(self, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        del v, options
        keys, values = (x.expand(k.shape[0], *x.shape[1:]) for x in (self.keys, self.values))
        return keys, values


def read_only(model: Any, cache: Any, new: int) -> DynamicCache:
    """Return a cache in which the last `new` tokens of the model's can be read again.

    They see their own keys and values, those of the whole model. The model has layers of attention
    without first tokens kept beside a window.
    """
    made = DynamicCache(config=model.config)
    length = int(cache.get_seq_length())
    shown: list[Any] = [_Read(layer, length, new) for layer in cache.layers]
    made.layers = shown
    return made
