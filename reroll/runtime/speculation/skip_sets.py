"""Drafts that leave out trips of the model's loop: a set chosen once, or anew as they go on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from reroll.bounds import COUNT
from reroll.errors import UsageError
from reroll.rewrite.pipeline.declared import Declared
from reroll.rewrite.pipeline.options import option
from reroll.runtime.speculation.choosing import best_path, by_agreement, least_influence, read_only
from reroll.runtime.speculation.reading import Reading
from reroll.runtime.speculation.skipping import Skipping


class StaticSkipOptions(Declared):
    """Options of `static-skip`."""

    category = "draft"
    name = "static-skip"

    skip: int | None = option(
        None, within=COUNT, help="how many trips are left out; a quarter by default"
    )
    by: Literal["path", "influence", "agreement"] = option(
        "path", help="how they are chosen on the last tokens of the prompt"
    )
    tokens: int = option(64, within=COUNT, help="how many tokens they are chosen on")


class StaticSkip(Skipping):
    """A draft without some trips, which are chosen once, on the last tokens of the first prompt.

    Those tokens are read without what came before. `path` is the dynamic programme of CLaSp over
    all of them, `influence` leaves out the trips that change the hidden state least, and
    `agreement` one after the other, the one without which the likeliest tokens change least: the
    model then runs on the tokens for each trip, as often as trips are left out.
    """

    def __init__(
        self, name: str, model: Reading, rows: Sequence[Tensor], options: StaticSkipOptions
    ) -> None:
        super().__init__(name, model)
        skip = number_of(options.skip, self.count, name)
        inputs = self.inputs(rows[0][-options.tokens :], 0)
        if options.by == "agreement":
            self.chosen = by_agreement(self.module, self.loop, inputs, skip)
            return
        if options.by == "path":
            self.refuse_several()
        states = self.states_of(inputs)
        if options.by == "influence":
            self.chosen = least_influence(states, skip)
        else:
            self.chosen = best_path(self.module, self.loop, inputs, None, states, skip)

    def choose(self, row: Tensor, count: int) -> tuple[Sequence[int], int]:
        return self.chosen, count


class ClaspOptions(Declared):
    """Options of `clasp`."""

    category = "draft"
    name = "clasp"

    skip: int | None = option(
        None, within=COUNT, help="how many trips are left out; a quarter by default"
    )
    every: int = option(8, within=COUNT, help="after how many proposals they are chosen anew")


class Clasp(Skipping):
    """A draft whose left-out trips are chosen anew by the last accepted token.

    CLaSp (arXiv 2505.24196): a dynamic programme over the cosine to the hidden states that the last
    verification has computed. Neighbouring tokens like the same trips, so that they are chosen
    after every `every` proposals. Before the first verification, the last tokens of the prompt
    take its place.
    """

    def __init__(
        self, name: str, model: Reading, rows: Sequence[Tensor], options: ClaspOptions
    ) -> None:
        super().__init__(name, model)
        self.refuse_rows(rows)
        self.skip = number_of(options.skip, self.count, name)
        self.every, self.age = options.every, 0
        self.refuse_several()
        for number in range(self._layers(0).start, self._layers(self.count - 1).stop):
            layer = self.plan[number]
            if layer.recent is not None or layer.layer_type == "hybrid_sliding" or layer.prefix:
                raise UsageError(
                    "the model has a recurrence, or first tokens beside a window, whose state "
                    "before the last token is gone when trips are chosen by it",
                    where=f"draft {name}",
                    hint="static-skip chooses on the prompt",
                )
        inputs = self.inputs(rows[0][-32:], 0)
        states = self.states_of(inputs)
        self.chosen = best_path(self.module, self.loop, inputs, None, states, self.skip)

    def choose(self, row: Tensor, count: int) -> tuple[Sequence[int], int]:
        # the last token is in no cache yet
        last = len(row) - 2
        place = last - self.observed.past
        if self.age >= self.every and self.observed.states and place >= 0:
            states = [each[0, place : place + 1] for each in self.observed.states]
            cache = read_only(self.module, self.model.cache, 1)
            inputs = self.inputs(row[last : last + 1], last)
            self.chosen = best_path(self.module, self.loop, inputs, cache, states, self.skip)
            self.age = 0
        self.age += 1
        return self.chosen, count


def number_of(skip: int | None, trips: int, name: str) -> int:
    """Return how many trips are left out; UsageError if none would be left."""
    skip = max(trips // 4, 1) if skip is None else skip
    if skip >= trips:
        raise UsageError(
            f"{skip} trips cannot be left out of {trips}", f"draft {name}", f"1 to {trips - 1}"
        )
    return skip
