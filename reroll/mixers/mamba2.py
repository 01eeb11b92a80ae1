"""Mamba-2 (state-space duality): one decay for each head, and a step size that scales the write.

S_t = exp(g_t) S_{t-1} + dt_t B_t x_t^T, y_t = C_t S_t, with k = B, v = x, q = C and g = -A dt: Dao
and Gu, 2024 (arXiv 2405.21060), section 6. The skip D x, the convolution and the gated norm act on
each token or window alone. They are ordinary operations of the program.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from reroll.mixers.base import Gates, Prepared
from reroll.mixers.core import Core
from reroll.mixers.diagonal import Diagonal
from reroll.mixers.gates import Gate, inverse_softplus, pooled, wide


class Mamba2(Diagonal):
    """Mamba-2: one decay for each head, and a step size that scales the write."""

    name = "mamba2"
    core = Core("head", key="gated")

    def gates(self, d_k: int, d_v: int) -> tuple[Gate, ...]:
        decay = Gate(
            name="log_decay",
            role="decay",
            high=0.0,
            activation=lambda raw: -F.softplus(wide(raw)),
            inverse=lambda value: inverse_softplus(-value),
            from_key={"paper": lambda k: -F.softplus(pooled(k))},
        )
        dt = Gate(
            name="dt",
            role="write",
            low=0.0,
            activation=lambda raw: F.softplus(wide(raw)),
            inverse=inverse_softplus,
            usual=1.0,
        )
        return decay, dt

    def default_scale(self, d_k: int) -> float:
        return 1.0

    def prepare(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates) -> Prepared:
        q, k, v, (log_decay, dt) = super().prepare(q, k, v, gates)
        return q, k * dt[..., None], v, (log_decay,)
