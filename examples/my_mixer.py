"""A mixer of one's own: a weighted mean of all values so far.

    reroll convert MODEL OUT --load FILE --passes 'linearize(mixer=mean, window=64)'

Whatever opens OUT later needs the mixer too: reroll generate OUT --load FILE --prompt '...'
"""

import torch
from torch import Tensor

from reroll.mixers import Gate, Mixer, State
from reroll.mixers.base import Result
from reroll.mixers.gates import strength_gate


class Mean(Mixer):
    """The mean of all values so far, each weighted by a gate."""

    name = "mean"

    def gates(self, d_k: int, d_v: int) -> tuple[Gate, ...]:
        # a padded token gets the gate's neutral value, 0, and so counts for nothing
        return (strength_gate("weight"),)

    def state_shapes(self, d_k: int, d_v: int) -> tuple[tuple[int, ...], ...]:
        # the weighted sum of the values, and the sum of the weights
        return (d_v,), ()

    def parallel_form(
        self, q: Tensor, k: Tensor, v: Tensor, gates: tuple[Tensor, ...], state: State
    ) -> Result:
        (weight,) = gates
        sums = state[0][:, :, None] + (weight[..., None] * v).cumsum(2)
        totals = state[1][:, :, None] + weight.cumsum(2)
        out = (sums / totals.clamp(min=1e-6)[..., None]).unsqueeze(2)
        # all query heads of a group read the same: [batch, kv_heads, groups, time, d_v]
        return out.expand(*q.shape[:-1], -1), (sums[:, :, -1], totals[:, :, -1])

    def chunk_form(
        self, q: Tensor, k: Tensor, v: Tensor, gates: tuple[Tensor, ...], state: State
    ) -> Result:
        # a running sum takes a sequence in one go already
        return self.parallel_form(q, k, v, gates, state)

    def step_form(
        self, q: Tensor, k: Tensor, v: Tensor, gates: tuple[Tensor, ...], state: State
    ) -> Result:
        (weight,) = gates
        sums, total = state[0] + weight[..., None] * v, state[1] + weight
        out = (sums / torch.clamp(total, min=1e-6)[..., None]).unsqueeze(2)
        return out.expand(*q.shape[:-1], -1), (sums, total)
