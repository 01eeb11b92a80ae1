"""Gated linear attention: a decay for each channel of the keys.

S_t = diag(exp g_t) S_{t-1} + k_t v_t^T, o_t = q_t S_t, g = log sigmoid(raw) / 16: Yang et al., 2023
(arXiv 2312.06635), equations 3 and 4.
"""

from __future__ import annotations

from reroll.mixers.diagonal import ChannelDiagonal
from reroll.mixers.gates import LIGER_NORMALISER, Gate, decay_gate, log_sigmoid


class GLA(ChannelDiagonal):
    """Gated linear attention: a state with one decay for each channel of the key."""

    name = "gla"

    def gates(self, d_k: int, d_v: int) -> tuple[Gate, ...]:
        size = self.features(d_k)
        liger = {
            "paper": log_sigmoid,
            "code": lambda k: log_sigmoid(k, LIGER_NORMALISER),
        }
        # a gate from the key has one number for each channel of the key
        return (decay_gate((size,), 16.0, self.floor, liger if size == d_k else None),)
