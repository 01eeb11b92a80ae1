"""Drafts that are the model itself on some trips of its loop, which are chosen while it decodes.

Nothing is lowered for a set of trips, and there is no state beside the model's: of each trip that
runs, the draft reads the model's cache layers. Layers outside the loop always run.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from reroll.errors import UsageError
from reroll.runtime.functions.loops import Trips
from reroll.runtime.speculation.drafts import Proposal, Wish, borrow, can_borrow, continued
from reroll.runtime.speculation.reading import Reading
from reroll.runtime.state.caches import layers_of

HINT = "passes make a draft of any layers: skip(layers=[...])"


class Observed:
    """Hidden states of the model's last forward with a cache: `states` [batch, time, width].

    One is before each trip of the loop, and one after the last. `past` is how many tokens the cache
    held before. Nothing is observed while a draft runs.
    """

    def __init__(self) -> None:
        self.states: list[Tensor] = []
        self.past, self.paused = 0, False

    def watch(self, owner: object, modules: Sequence[Any]) -> None:
        """Collect the states of these trips for as long as `owner` lives."""

        def before(_: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            layers = options.get("past_key_values")
            if not self.paused and layers:
                self.states, self.past = [args[0]], int(layers[0].get_seq_length())

        def behind(_: Any, args: Any, options: dict[str, Any], out: Any) -> None:
            if not self.paused and options.get("past_key_values"):
                self.states.append(out[0])

        handles = [modules[0].register_forward_pre_hook(before, with_kwargs=True)]
        handles += [each.register_forward_hook(behind, with_kwargs=True) for each in modules]
        for handle in handles:
            weakref.finalize(owner, handle.remove)

    @contextmanager
    def pause(self) -> Iterator[None]:
        self.paused = True
        try:
            yield
        finally:
            self.paused = False


class Skipping:
    """A draft of the trips that `choose` names; the base of those that choose.

    Raises UsageError for a model without a loop of several trips, and for states that cannot be
    shared with it.
    """

    def __init__(self, name: str, model: Reading) -> None:
        self.name, self.model, self.module = name, model, model.module
        self.loop, self.trips = loop_of(self.module, name)
        self.plan = self.module._assembly.layers
        if not all(can_borrow(layer, layer) for layer in self.plan):
            raise UsageError(
                "the model has layers whose attention is cut in chunks, and a draft cannot read "
                "them from the model's cache",
                where=f"draft {name}",
                hint=HINT,
            )
        self.count = len(self.trips.modules)
        self.observed = Observed()
        self.observed.watch(self, self.trips.modules)

    def choose(self, row: Tensor, count: int) -> tuple[Sequence[int], int]:
        """Return the trips that run, in ascending order, and how many tokens to propose.

        `row` [time] is the first one.
        """
        raise NotImplementedError

    def propose(self, rows: Sequence[Tensor], wish: Wish) -> Proposal:
        with self.observed.pause():
            chosen, count = self.choose(rows[0], wish.count)
            chosen = self.completed(chosen)
            model = self.model
            cache = self._borrowed(chosen)
            reading = Reading(self.module, cache, lengths=model.lengths, mask=model.mask)
            with self.trips.running(chosen):
                logits = reading.read(torch.stack([row[-1:] for row in rows]), keep=1)
                return continued(reading, logits, replace(wish, count=count))

    def select(self, rows: Tensor) -> None:
        pass

    def completed(self, chosen: Sequence[int]) -> list[int]:
        """Add trips so that each kind of state is updated, of which masks and positions are made.

        Masks are shared by layers of a kind, and made from the first of them.
        """
        kinds: dict[Any, int] = {}
        for trip in range(self.count):
            for layer in self._layers(trip):
                kinds.setdefault(self._kind(layer), trip)
        elsewhere = {self._kind(n) for n in self._outside()}
        found = {self._kind(n) for trip in chosen for n in self._layers(trip)} | elsewhere
        missing = [trip for kind, trip in kinds.items() if kind not in found]
        return sorted({*chosen, *missing})

    def inputs(self, row: Tensor, past: int) -> dict[str, Tensor]:
        """Return the inputs of the model's forward for tokens [time] behind so many others."""
        return inputs_of(self.module, row[None], past)

    def states_of(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        """Return the hidden states [time, width] before each trip and after the last, of one row.

        They are those of a forward without a past.
        """
        states: list[Tensor] = []

        def before(_: Any, args: tuple[Any, ...]) -> None:
            states.append(args[0][0])

        def behind(_: Any, args: tuple[Any, ...], out: Any) -> None:
            states.append(out[0][0])

        modules = self.trips.modules
        handles = [modules[0].register_forward_pre_hook(before)]
        handles += [each.register_forward_hook(behind) for each in modules]
        try:
            self.module.run_function(self.module._assembly.backbone, inputs)
        finally:
            for handle in handles:
                handle.remove()
        return states

    def refuse_several(self) -> None:
        """Raise UsageError if trips hand on more than a hidden state."""
        loop = next(each for each in self.module.program.loops if each.name == self.loop)
        if len(loop.carry) != 1:
            raise UsageError(
                f"{self.loop} carries {len(loop.carry)} values, and trips are chosen by one",
                where=f"draft {self.name}",
                hint=HINT,
            )

    def refuse_rows(self, rows: Sequence[Tensor]) -> None:
        """Raise UsageError for more than one row: trips are chosen by one."""
        if len(rows) > 1:
            raise UsageError(
                f"trips are chosen by one row of tokens, and there are {len(rows)}",
                where=f"draft {self.name}",
                hint="static-skip chooses by the first prompt, for all rows",
            )

    def _layers(self, trip: int) -> range:
        """Return the numbers of a trip's cache layers."""
        first = self.trips.first_layer + trip * self.trips.layers_per_trip
        return range(first, first + self.trips.layers_per_trip)

    def _outside(self) -> list[int]:
        inside = range(self._layers(0).start, self._layers(self.count - 1).stop)
        return [n for n in range(len(self.plan)) if n not in inside]

    def _kind(self, number: int) -> Any:
        layer = self.plan[number]
        return layer.reach, layer.recent is None

    def _borrowed(self, chosen: Sequence[int]) -> DynamicCache:
        """Return a cache of the model's entries; layers that do not run count as those that do."""
        cache = DynamicCache(config=self.module.config)
        layers = layers_of(cache, self.plan) or []
        run = [*self._outside(), *(n for trip in chosen for n in self._layers(trip))]
        stands_for: dict[Any, Any] = {}
        for number in sorted(run):
            borrow(self.model.cache.layers[number], layers[number], self.model.mask)
            stands_for.setdefault(self._kind(number), layers[number])
        for number in set(range(len(layers))) - set(run):
            cache.layers[number] = stands_for[self._kind(number)]
        return cache


def inputs_of(module: Any, tokens: Tensor, past: int) -> dict[str, Tensor]:
    """Return the inputs of a forward for tokens [rows, time] behind so many others."""
    inputs = {"input_ids": tokens}
    if any(item.name == "position_ids" for item in module.program.inputs):
        places = torch.arange(past, past + tokens.shape[1], device=tokens.device)
        inputs["position_ids"] = places[None]
    return inputs


def loop_of(model: Any, name: str) -> tuple[str, Trips]:
    """Return the longest loop of a lowered model, by name; UsageError without one."""
    loops = {
        key: each
        for key, each in model._assembly.loops.items()
        if len(each.modules) > 1 and each.layers_per_trip
    }
    if not loops:
        raise UsageError(
            "the model has no loop of several trips, of which some could be left out",
            where=f"draft {name}",
            hint=HINT,
        )
    key = max(loops, key=lambda each: len(loops[each].modules))
    if loops[key].count is not None:
        raise UsageError(
            "the number of trips was set", f"draft {name}", "model.set_trips(None) takes it back"
        )
    return key, loops[key]
