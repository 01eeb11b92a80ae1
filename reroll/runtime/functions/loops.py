"""Run a loop: its trips in order, each with its own weights, inputs and cache layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from reroll.errors import UsageError
from reroll.rewrite.ir.exits import is_open
from reroll.runtime.functions.documents import Documents
from reroll.runtime.functions.exits import LoopExits, can_compact, run_compacted
from reroll.runtime.functions.hidden import NO_STATES, Entries, TripStates, run_observed


@dataclass
class Trips:
    """Trips of one loop, and the cache layers that belong to each."""

    modules: Sequence[nn.Module]
    first_layer: int
    layers_per_trip: int
    # set by `set_trips`: number of trips to run, and number of the last ones that get gradients
    count: int | None = None
    backprop: int | None = None
    # set by `running`: numbers of the trips to run
    only: Sequence[int] | None = None
    exits: LoopExits | None = None
    hidden: TripStates = NO_STATES
    weighed: TripStates | None = None

    def schedule(self, layers: Sequence[Any] | None) -> Sequence[int]:
        """Return the numbers of the trips to run, in order."""
        if self.only is not None:
            return self.only
        if self.count is None:
            return range(len(self.modules))
        if layers is not None and self.layers_per_trip and self.count > len(self.modules):
            raise UsageError(
                f"the caches are for {len(self.modules)} trips, and {self.count} are set",
                hint="pass use_cache=False, or convert with more trips",
            )
        return range(self.count)

    def module(self, number: int) -> nn.Module:
        """Return the module of a trip; trips beyond the last one are like it."""
        return self.modules[min(number, len(self.modules) - 1)]

    @contextmanager
    def running(self, only: Sequence[int]) -> Iterator[None]:
        """Run only these trips, in ascending order; each keeps its own inputs and cache layers."""
        before, self.only = self.only, only
        try:
            yield
        finally:
            self.only = before


@dataclass
class ForwardState:
    """State of one forward: cache layers, loops, and what the caller requests.

    `keep` is `logits_to_keep`: the number of last positions, or their indices; 0 means all.
    `hidden` collects hidden states and attention weights if the caller asked for them. `embeddings`
    are those that the caller gave in place of token ids, by the input's name. `documents` are those
    of packed rows.
    """

    loops: Mapping[str, Trips]
    layers: Sequence[Any] | None = None
    keep: int | Tensor = 0
    hidden: Entries | None = None
    embeddings: Mapping[str, Tensor] = field(default_factory=dict)
    documents: Documents | None = None


def run_loop(
    state: ForwardState, name: str, carry: tuple[Any, ...], inputs: tuple[Any, ...]
) -> Any:
    """Run a loop and return its last carry; an input that is a tuple has one value per trip."""
    trips = state.loops[name]
    layers, count = state.layers, trips.layers_per_trip
    schedule, exits = trips.schedule(layers), trips.exits
    weighs = state.hidden is not None and state.hidden.weights
    given = trips.weighed if weighs and trips.weighed is not None else trips.hidden
    frozen = 0 if trips.backprop is None else len(schedule) - trips.backprop
    for step, number in enumerate(schedule):
        trip = trips.module(number)
        values = [v[number] if isinstance(v, tuple) else v for v in inputs]
        trip_layers = None
        if layers is not None and count:
            start = trips.first_layer + number * count
            trip_layers = layers[start : start + count]
        old = carry
        if state.hidden is not None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and step >= frozen):
                carry = run_observed(trip, given, state.hidden, carry, values, trip_layers)
        elif step < frozen:
            with torch.no_grad():
                carry = trip(*carry, *values, past_key_values=trip_layers)
        elif (
            exits is not None and trip_layers is not None and can_compact(exits, carry, trip_layers)
        ):
            carry = run_compacted(trip, exits, carry, values, trip_layers)
        else:
            carry = trip(*carry, *values, past_key_values=trip_layers)
        if exits is not None and is_open(exits.thresholds[number]):
            kept = {"past_key_values": trip_layers} if exits.test_has_state else {}
            carry = trip(*old, *carry, *values, **kept, function="test")
    return carry


def run_static(state: ForwardState, name: str, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Compute what trips derive from `inputs` and their weights alone, in the order of trips."""
    values: list[Any] = []
    for trip in state.loops[name].modules:
        values.extend(trip(*inputs, function="static"))
    return tuple(values)


def read_out(model: Any, hidden: Tensor, depth: int = 0, **inputs: Any) -> Tensor:
    """Compute the logits of a lowered model from the result of its last loop.

    `hidden` [batch, time, width] takes the place of that result. `depth` is the number of trips
    after which it was computed; 0 is the full depth. It matters where exits have heads of their
    own. `inputs` are those of the model's forward. No trip runs.
    """
    loops = model._assembly.loops
    kept, last = dict(loops), model.program.loops[-1].name
    exits = kept[last].exits
    counter = None if exits is None else exits.left_position + 1
    try:
        for name in kept:
            result = hidden if name == last else None
            loops[name] = Trips([_FixedResult(result, counter, depth)], 0, 0)
        logits: Tensor = model(**inputs, return_dict=True).logits
    finally:
        loops.update(kept)
    return logits


class _FixedResult(nn.Module):
    """A trip that computes nothing: it returns given hidden states, or its carry unchanged.

    `counter` is the position of the carried value that counts trips, which is set to `depth`.
    """

    def __init__(self, hidden: Tensor | None, counter: int | None, depth: int) -> None:
        super().__init__()
        self.hidden, self.counter, self.depth = hidden, counter, depth

    def forward(self, *carry: Any, past_key_values: Any = None) -> tuple[Any, ...]:
        del past_key_values
        if self.hidden is None:
            return carry
        # a loop with exits may also carry the hidden state with which each token left
        shape = carry[0].shape
        values = [
            self.hidden if isinstance(value, Tensor) and value.shape == shape else value
            for value in carry
        ]
        if self.counter is not None:
            values[self.counter] = torch.full_like(values[self.counter], self.depth)
        return tuple(values)


def look_up(table: nn.Module, ids: Tensor, name: str, state: ForwardState) -> Tensor:
    """Look up the embeddings of an input's tokens, or return those that the caller gave instead."""
    given = state.embeddings.get(name)
    return table(ids) if given is None else given


def keep_positions(values: Tensor, state: ForwardState) -> Tensor:
    """Select the positions of [batch, time, ...] for which the caller wants logits."""
    if isinstance(state.keep, Tensor):
        return values[:, state.keep]
    return values[:, -state.keep :] if state.keep else values
