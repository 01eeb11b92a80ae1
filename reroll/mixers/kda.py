"""Kimi Delta Attention: the delta rule on a state that decays channel by channel.

S_t = (I - b_t k_t k_t^T) diag(exp g_t) S_{t-1} + b_t k_t v_t^T, o_t = q_t S_t: Kimi team, 2025
(arXiv 2510.26692), equation 1. The gate is bounded, g = floor * sigmoid(raw); or, without a floor,
g = -softplus(raw), and chunks are short.
"""

from __future__ import annotations

from reroll.bounds import Range
from reroll.mixers import delta_form
from reroll.mixers.core import Core
from reroll.mixers.decay import ChannelDecay, FactoredDecay, MakeDecay, bounded_size
from reroll.mixers.gated_deltanet import decay_of_softplus
from reroll.mixers.gates import Gate, logit, wide
from reroll.rewrite.pipeline.options import option

# tokens of a chunk whose decays are computed pair by pair
PAIRED = 8


class KDA(delta_form.Delta):
    """Kimi Delta Attention: the delta rule, with one decay for each channel of the key."""

    name = "kda"
    core = Core("channel", delta=True)
    decays = ChannelDecay, FactoredDecay

    floor: float | None = option(
        -5.0,
        within=Range(below=0),
        help="the lowest log decay, if there is one; a higher one allows longer chunks",
    )

    @property
    def longest_chunk(self) -> int:
        if self.floor is None:
            return min(self.chunk_size, PAIRED)
        return bounded_size(self.chunk_size, self.floor)

    @property
    def chunk_decay(self) -> MakeDecay:
        return ChannelDecay if self.floor is None else super().chunk_decay

    def gates(self, d_k: int, d_v: int) -> tuple[Gate, ...]:
        floor = self.floor
        if floor is None:
            return decay_of_softplus((d_k,)), self.strength()
        decay = Gate(
            name="log_decay",
            role="decay",
            shape=(d_k,),
            low=floor,
            high=0.0,
            floor=floor,
            activation=lambda raw: floor * wide(raw).sigmoid(),
            inverse=lambda value: logit(value / floor),
        )
        return decay, self.strength()
