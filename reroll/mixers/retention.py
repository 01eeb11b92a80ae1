"""Retention with a gate: one decay for each head and token.

S_t = exp(g_t) S_{t-1} + k_t v_t^T, o_t = q_t S_t. With a constant g it is RetNet (Sun et al., 2023,
arXiv 2307.08621, equation 5). With a g for each token it is the gated retention of YOCO (Sun et
al., 2024, arXiv 2405.05254) and the "simple GLA" of flash-linear-attention.
"""

from __future__ import annotations

from reroll.mixers.diagonal import Diagonal
from reroll.mixers.gates import Gate, decay_gate, log_sigmoid, pooled


class Retention(Diagonal):
    """Retention: one decay for each head and token."""

    name = "retention"

    def gates(self, d_k: int, d_v: int) -> tuple[Gate, ...]:
        return (decay_gate(from_key={"paper": lambda k: log_sigmoid(pooled(k))}),)
