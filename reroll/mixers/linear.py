"""Linear attention: no decay, and the weights over all tokens so far sum to one.

S_t = S_{t-1} + phi(k_t) v_t^T, z_t = z_{t-1} + phi(k_t), o_t = phi(q_t) S_t / (phi(q_t) . z_t):
Katharopoulos et al., 2020 (arXiv 2006.16236), equations 18 to 20.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reroll.mixers import linear_form
from reroll.mixers.base import Gates, Result, State
from reroll.mixers.core import Core
from reroll.mixers.decay import NoDecay
from reroll.mixers.diagonal import Diagonal
from reroll.mixers.feature_maps import Name
from reroll.mixers.gates import Gate
from reroll.mixers.linear_form import counted
from reroll.mixers.trees import Tree
from reroll.rewrite.pipeline.options import option

# lower bound of the divisor: the sum of weights is 0 before the first token, and where no feature
# is active
FLOOR = 1e-6


class Linear(Diagonal):
    """Normalised linear attention: a sum over all tokens so far."""

    name = "linear"
    core = Core("none", counts=True)
    divides = "normalise"

    feature_map: Name = option("elu", help="feature map of queries and keys")
    normalise: bool = option(True, help="divide by the sum of weights")

    def gates(self, d_k: int, d_v: int) -> tuple[Gate, ...]:
        return ()

    @property
    def normalised(self) -> bool:
        return self.normalise

    def state_shapes(self, d_k: int, d_v: int) -> tuple[tuple[int, ...], ...]:
        size = self.features(d_k)
        return ((size, d_v), (size,))

    def default_scale(self, d_k: int) -> float:
        return 1.0

    def parallel_form(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State) -> Result:
        return self.split(*linear_form.stretch(q, k, counted(v), NoDecay(k[..., 0]), _joint(state)))

    def chunk_form(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State) -> Result:
        like = k[..., 0].to(state[0].dtype)
        sums, end = linear_form.chunks(
            q, k, counted(v), like, NoDecay, _joint(state), self.chunk_size, wide=self.normalise
        )
        return self.split(sums, end)

    def step_form(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State) -> Result:
        kept = torch.ones_like(k[..., :1])
        return self.split(*linear_form.step(q, k, counted(v), kept, _joint(state)))

    def tree_form(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State, tree: Tree
    ) -> Tensor:
        decay, before = NoDecay(k[..., 0], tree), _joint(state)
        return self.split(linear_form.reads(q, k, counted(v), decay, before), before)[0]

    def split(self, sums: Tensor, state: Tensor) -> Result:
        """Compute the output from sums of values and weights; split the state into its parts."""
        values, weights = sums[..., :-1], sums[..., -1:]
        out = values / weights.clamp(min=FLOOR) if self.normalise else values
        return out, (state[..., :-1], state[..., -1])


def _joint(state: State) -> Tensor:
    return torch.cat([state[0], state[1].unsqueeze(-1)], -1)
