"""Running a loop: its trips in turn, each with its own weights, inputs and cache layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass
class Trips:
    """The trips of one loop, and the cache layers that belong to each."""

    modules: Sequence[nn.Module]
    first_layer: int
    layers_per_trip: int


@dataclass
class State:
    """What one forward carries along: cache layers, loops, and what the caller wants of it.

    `keep` is `logits_to_keep`: how many of the last positions, or which, 0 for all. `hidden`
    collects the value that the loops carry, if the caller asked for it.
    """

    loops: Mapping[str, Trips]
    layers: Sequence[Any] | None = None
    keep: int | Tensor = 0
    hidden: list[Tensor] | None = None
    embeddings: Tensor | None = None


def run_loop(state: State, name: str, carry: tuple[Any, ...], inputs: tuple[Any, ...]) -> Any:
    """The last carry of a loop. An input that is a tuple has one value per trip."""
    trips = state.loops[name]
    layers, count, start = state.layers, trips.layers_per_trip, trips.first_layer
    for number, trip in enumerate(trips.modules):
        values = [v[number] if isinstance(v, tuple) else v for v in inputs]
        if state.hidden is not None:
            state.hidden.append(carry[0])
        own = None
        if layers is not None and count:
            own = layers[start : start + count]
            start += count
        carry = trip(*carry, *values, past_key_values=own)
    return carry


def run_static(state: State, name: str, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """What the trips of a loop compute from `inputs` and their weights alone, trip after trip."""
    values: list[Any] = []
    for trip in state.loops[name].modules:
        values.extend(trip.static(*inputs))  # type: ignore[operator]
    return tuple(values)


def look_up(table: nn.Module, ids: Tensor, state: State) -> Tensor:
    """The embeddings of the tokens, or those that the caller gave instead."""
    return table(ids) if state.embeddings is None else state.embeddings  # type: ignore[no-any-return]


def keep_positions(hidden: Tensor, state: State) -> Tensor:
    """The positions of [batch, time, ...] whose outputs the caller wants."""
    if state.hidden is not None:
        state.hidden.append(hidden)
    if isinstance(state.keep, Tensor):
        return hidden[:, state.keep]
    return hidden[:, -state.keep :] if state.keep else hidden
