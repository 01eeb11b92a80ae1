"""Base classes of mixers with a diagonal decay: S_t = A_t S_{t-1} + k_t v_t^T, o = q S.

The first gate is the log decay, one for each head, or one for each channel of the keys.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from reroll.bounds import Range
from reroll.mixers import linear_form
from reroll.mixers.base import Gates, Mixer, Prepared, Result, State
from reroll.mixers.core import Core
from reroll.mixers.decay import (
    ChannelDecay,
    FactoredDecay,
    HeadDecay,
    MakeDecay,
    bounded_size,
    kept,
)
from reroll.mixers.feature_maps import FEATURE_MAPS, Name
from reroll.mixers.trees import Tree
from reroll.rewrite.pipeline.options import option


class Diagonal(Mixer):
    """A linear recurrence whose decay is a number for each head."""

    core = Core("head")
    # over all tokens at once, and in chunks
    decays: ClassVar[tuple[MakeDecay, MakeDecay]] = HeadDecay, HeadDecay

    feature_map: Name = option("none", help="feature map of queries and keys")

    @property
    def key_map(self) -> str:
        return self.feature_map

    def state_shapes(self, d_k: int, d_v: int) -> tuple[tuple[int, ...], ...]:
        return ((self.features(d_k), d_v),)

    def features(self, d_k: int) -> int:
        """Return the number of channels of a key after the feature map."""
        return FEATURE_MAPS[self.feature_map].size(d_k)

    def prepare(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates) -> Prepared:
        if self.feature_map == "none":
            return q, k, v, gates
        phi = FEATURE_MAPS[self.feature_map]
        return phi(q), phi(k), v, gates

    def parallel_form(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State) -> Result:
        out, end = linear_form.stretch(q, k, v, self.decays[0](gates[0]), state[0])
        return out, (end,)

    def chunk_form(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State) -> Result:
        size = self.longest_chunk or self.chunk_size
        out, end = linear_form.chunks(q, k, v, gates[0], self.decays[1], state[0], size)
        return out, (end,)

    def step_form(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State) -> Result:
        out, end = linear_form.step(q, k, v, kept(gates[0], k), state[0])
        return out, (end,)

    def tree_form(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State, tree: Tree
    ) -> Tensor:
        return linear_form.reads(q, k, v, self.decays[0](gates[0], tree), state[0])


class ChannelDiagonal(Diagonal):
    """A linear recurrence whose decay is a vector over the channels of the keys."""

    core = Core("channel")
    decays = ChannelDecay, FactoredDecay

    floor: float = option(
        -2.5,
        within=Range(below=0),
        help="lower bound of log decays; a higher one allows longer chunks",
    )

    @property
    def longest_chunk(self) -> int:
        return bounded_size(self.chunk_size, self.floor)
