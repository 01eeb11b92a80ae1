"""DeltaNet: a linear attention that overwrites values under a key.

S_t = (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T, o_t = q_t S_t, with keys of length one: Schlag et
al., 2021 (arXiv 2102.11174), equation 24; Yang et al., 2024 (arXiv 2406.06484). With b up to 2 the
state can change sign: Grazzi et al., 2024 (arXiv 2411.12537).
"""

from __future__ import annotations

from torch import Tensor

from reroll.mixers import delta_form
from reroll.mixers.base import Gates, Result, State
from reroll.mixers.core import Core
from reroll.mixers.decay import NoDecay
from reroll.mixers.gates import Gate


class DeltaNet(delta_form.Delta):
    """DeltaNet: the delta rule, which overwrites the value under a key."""

    name = "deltanet"
    core = Core("none", delta=True)
    decays = NoDecay, NoDecay

    def gates(self, d_k: int, d_v: int) -> tuple[Gate, ...]:
        return (self.strength(),)

    def step_form(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State) -> Result:
        state_after = delta_form.update(k, v, gates[0], state[0])
        return q @ state_after, (state_after,)

    tree_form = delta_form.Delta.tree_form
