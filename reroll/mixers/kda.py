"""Kimi Delta Attention: the delta rule on a state that decays channel by channel.

S_t = (I - b_t k_t k_t^T) diag(exp g_t) S_{t-1} + b_t k_t v_t^T, o_t = q_t S_t: Kimi team, 2025
(arXiv 2510.26692), equation 1. The gate is bounded: g = floor * sigmoid(raw).
"""

from __future__ import annotations

from reroll.bounds import Range
from reroll.mixers import delta_form
from reroll.mixers.core import Core
from reroll.mixers.decay import ChannelDecay, FactoredDecay, bounded_size
from reroll.mixers.gates import Gate, logit, wide
from reroll.rewrite.pipeline.options import option


class KDA(delta_form.Delta):
    """Kimi Delta Attention: the delta rule, with one decay for each channel of the key."""

    name = "kda"
    core = Core("channel", delta=True)
    decays = ChannelDecay, FactoredDecay

    floor: float = option(
        -5.0,
        within=Range(below=0),
        help="the lowest log decay; a higher one allows longer chunks",
    )

    @property
    def longest_chunk(self) -> int:
        return bounded_size(self.chunk_size, self.floor)

    def gates(self, d_k: int, d_v: int) -> tuple[Gate, ...]:
        decay = Gate(
            name="log_decay",
            role="decay",
            shape=(d_k,),
            low=self.floor,
            high=0.0,
            floor=self.floor,
            activation=lambda raw: self.floor * wide(raw).sigmoid(),
            inverse=lambda value: logit(value / self.floor),
        )
        return decay, self.strength()
