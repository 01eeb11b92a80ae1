"""DeltaProduct: several delta rules for each token.

S_t = a_t prod_j (I - b_tj k_tj k_tj^T) S_{t-1} + (what they write), o_t = q_t S_t: Siems et al.,
2025 (arXiv 2502.10297), section 3. Two reflections are a rotation, so the state can do more than
flip. The first key and value are the token's `k` and `v`, the others come as gates; the state fades
once for each token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reroll.bounds import LARGEST, Range
from reroll.mixers import delta_form
from reroll.mixers.base import Gates, Prepared, Result, State
from reroll.mixers.gated_deltanet import decay_of_softplus
from reroll.mixers.gates import Gate
from reroll.mixers.trees import Tree
from reroll.rewrite.pipeline.options import option


class DeltaProduct(delta_form.Delta):
    """DeltaProduct: several overwrites for each token, so that a state can rotate."""

    name = "deltaproduct"

    negative: bool = option(
        True, help="let beta reach 2, so that a write can flip what it overwrites"
    )
    steps: int = option(
        2,
        within=Range(least=2, most=LARGEST),
        help="overwrites for each token; one is gated_deltanet",
    )

    def gates(self, d_k: int, d_v: int) -> tuple[Gate, ...]:
        more = self.steps - 1
        return (
            decay_of_softplus(),
            self.strength((self.steps,)),
            Gate(name="keys", role="key", shape=(more, d_k)),
            Gate(name="values", role="value", shape=(more, d_v)),
        )

    def write_flops(self, d_k: int, d_v: int) -> int:
        return self.steps * super().write_flops(d_k, d_v)

    def prepare(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates) -> Prepared:
        log_decay, beta, keys, values = gates
        if self.unit_keys:
            keys = delta_form.unit(keys)
        return super().prepare(q, k, v, (log_decay, beta, keys, values))

    def parallel_form(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State) -> Result:
        out, end = super().parallel_form(*self.stepwise(q, k, v, gates), state)
        return out[..., self.steps - 1 :: self.steps, :], end

    def chunk_form(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State) -> Result:
        out, end = super().chunk_form(*self.stepwise(q, k, v, gates), state)
        return out[..., self.steps - 1 :: self.steps, :], end

    def stepwise(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates) -> Prepared:
        """Expand each overwrite to a token of its own: the first decays, the last is read."""
        log_decay, beta, keys, values = gates
        k = torch.cat([k.unsqueeze(3), keys.to(k.dtype)], 3).flatten(2, 3)
        v = torch.cat([v.unsqueeze(3), values.to(v.dtype)], 3).flatten(2, 3)
        more = self.steps - 1
        fades = torch.cat([log_decay[..., None], log_decay.new_zeros(*log_decay.shape, more)], 3)
        q = q.repeat_interleave(self.steps, 3)
        return q, k, v, (fades.flatten(2, 3), beta.flatten(2, 3))

    def step_form(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State) -> Result:
        log_decay, beta, keys, values = gates
        s = delta_form.update(k, v, beta[..., 0], log_decay.exp()[..., None, None] * state[0])
        for j in range(self.steps - 1):
            s = delta_form.update(keys[..., j, :], values[..., j, :], beta[..., j + 1], s)
        return torch.matmul(q, s), (s,)

    def tree_form(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State, tree: Tree
    ) -> Tensor:
        steps = tree.repeated(self.steps)
        out = super().tree_form(*self.stepwise(q, k, v, gates), state, steps)
        return out[..., self.steps - 1 :: self.steps, :]
