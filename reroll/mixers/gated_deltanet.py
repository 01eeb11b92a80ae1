"""Gated DeltaNet: the delta rule on a state that decays.

S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T, o_t = q_t S_t, a = exp(g): Yang et al., 2024
(arXiv 2412.06464), equation 10. The state decays before it is read under the key.
"""

from __future__ import annotations

import torch.nn.functional as F

from reroll.mixers import delta_form
from reroll.mixers.core import Core
from reroll.mixers.gates import Gate, inverse_softplus, wide


class GatedDeltaNet(delta_form.Delta):
    """Gated DeltaNet: the delta rule, with one decay for each head."""

    name = "gated_deltanet"
    core = Core("head", delta=True)

    def gates(self, d_k: int, d_v: int) -> tuple[Gate, ...]:
        return decay_of_softplus(), self.strength()


def decay_of_softplus(shape: tuple[int, ...] = ()) -> Gate:
    """Return the gate log decay = -softplus(raw), as in Mamba-2 and Gated DeltaNet with A = 1."""
    return Gate(
        name="log_decay",
        role="decay",
        shape=shape,
        high=0.0,
        activation=lambda raw: -F.softplus(wide(raw)),
        inverse=lambda value: inverse_softplus(-value),
    )
