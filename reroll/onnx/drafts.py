"""Drafts of an exported model: tokens that came before, or the graph of a draft."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from onnxruntime import OrtValue

from reroll.onnx.sampling import Array, Sampling, draw
from reroll.onnx.state import Graph, Part, Snapshot, State
from reroll.runtime.speculation.lookup import followed


class Proposal(NamedTuple):
    """Tokens, and the distributions [tokens, vocabulary] that they were drawn from.

    Without distributions, no other tokens could have been proposed.
    """

    tokens: list[int]
    drawn_from: Array | None = None


class Draft(Protocol):
    """Proposes tokens that a model may follow its own with."""

    def propose(
        self, tokens: list[int], count: int, sampling: Sampling, random: np.random.Generator
    ) -> Proposal:
        """Propose up to `count` tokens after `tokens`."""


class Lookup:
    """Proposes the tokens that followed the last ones before."""

    def propose(
        self, tokens: list[int], count: int, sampling: Sampling, random: np.random.Generator
    ) -> Proposal:
        return Proposal([int(token) for token in followed(np.array(tokens), count)[0]])


class Keeping:
    """The graph of a draft with a state of its own, of the tokens that the model has accepted."""

    def __init__(self, graph: Graph) -> None:
        self.state = State(graph)
        self.start: Snapshot = self.state.mark()
        self.tokens: list[int] = []

    def propose(
        self, tokens: list[int], count: int, sampling: Sampling, random: np.random.Generator
    ) -> Proposal:
        read = self.state.read
        same = (a == b for a, b in zip(self.tokens[:read], tokens[:-1], strict=False))
        right = next((place for place, each in enumerate(same) if not each), None)
        right = min(read, len(tokens) - 1) if right is None else right
        if right < self.start.read and not self.state.graph.only_grows:
            # other tokens than those of before: there is no state to go back to
            self.state = State(self.state.graph)
        else:
            self.state.back(self.start, right)
        new = tokens[self.state.read :]
        self.state.reserve(len(tokens) + count)
        logits = self.state.extend(new, 1)
        # all tokens are read: from here on, they are proposed ones
        self.start = self.state.mark()
        made = _continued(self.state, logits, count, sampling, random)
        self.tokens = [*tokens, *made.tokens]
        return made


class Borrowing:
    """The graph of a draft whose state is made of entries of the model's, for each proposal."""

    def __init__(self, graph: Graph, model: State) -> None:
        self.graph, self.model = graph, model

    def propose(
        self, tokens: list[int], count: int, sampling: Sampling, random: np.random.Generator
    ) -> Proposal:
        # in place, a draft writes behind the model's tokens, which the model then writes itself
        self.model.reserve(len(tokens) + count)
        state = State(self.graph)
        state.read, state.room = self.model.read, self.model.room
        for part in self.graph.parts:
            state.arrays[part.input] = _borrowed(part, self.model)
        logits = state.extend(tokens[state.read :], 1)
        return _continued(state, logits, count, sampling, random)


def draft_of(graph: Graph, model: State, *, borrows: bool) -> Draft:
    """Return the draft of a graph: without a state of its own if the model has what it reads.

    `borrows` says that the layers of both have the same heads.
    """
    given = {part.input: part for part in model.graph.parts}
    fits = all(_source(part, given) is not None for part in graph.parts)
    return Borrowing(graph, model) if borrows and fits else Keeping(graph)


def _continued(
    state: State, logits: Array, count: int, sampling: Sampling, random: np.random.Generator
) -> Proposal:
    """Propose `count` tokens, of which the first has these logits [1, vocabulary]."""
    proposed: list[int] = []
    distributions: list[Array] = []
    while True:
        if sampling.temperature is None:
            proposed.append(int(logits[-1].argmax()))
        else:
            distributions.append(sampling.distribution(logits)[-1])
            proposed.append(draw(distributions[-1], random))
        if len(proposed) == count:
            return Proposal(proposed, np.stack(distributions) if distributions else None)
        logits = state.extend(proposed[-1:], 1)


# ---- entries of another state


def _source(part: Part, given: dict[str, Part]) -> Part | None:
    """Return the model's state that has all entries of a draft's; None if there is none."""
    same = given.get(part.input)
    if same is not None and (same.dims, same.dtype, same.in_place) == (
        part.dims,
        part.dtype,
        part.in_place,
    ):
        return same
    found = given.get(part.input.replace(".first_", "."))
    if found is None or found.dtype != part.dtype or not found.grows or part.grows:
        return None
    sizes = [(dims[0], dims[2]) if len(dims) == 3 else None for dims in (found.dims, part.dims)]
    return found if sizes[0] == sizes[1] else None


def _borrowed(part: Part, model: State) -> Array:
    """Return a draft's state of entries of the model's."""
    source = _source(part, {each.input: each for each in model.graph.parts})
    assert source is not None
    array = model.arrays[source.input]
    if source.input == part.input and source.dims == part.dims:
        return array
    # a window keeps the last tokens, behind zeros if there are fewer, and the first ones
    entries, made = array.numpy()[:, :, : model.read], part.zeros(0)
    count = min(made.shape[2], model.read)
    if ".first_" in part.input:
        made[:, :, :count] = entries[:, :, :count]
    elif count:
        made[:, :, -count:] = entries[:, :, -count:]
    return OrtValue.ortvalue_from_numpy(made)
