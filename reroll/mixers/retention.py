"""Retention with a gate for each token: one decay for each head and token.

S_t = exp(g_t) S_{t-1} + k_t v_t^T, o_t = q_t S_t. With a constant g it is RetNet (Sun et al., 2023,
arXiv 2307.08621, equation 5), with one for each token the gated retention of RetNet's sequel YOCO
(arXiv 2405.05254) and the "simple GLA" of flash-linear-attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reroll.mixers import linear_form
from reroll.mixers.base import Mixer, Result, State
from reroll.mixers.decay import HeadDecay
from reroll.mixers.gates import Gate, decay_gate, log_sigmoid, pooled


class Retention(Mixer):
    """Scalar decay for each head and token."""

    name = "retention"

    def gates(self, d_k: int, d_v: int) -> tuple[Gate, ...]:
        return (decay_gate(from_key={"paper": lambda k: log_sigmoid(pooled(k))}),)

    def state_shapes(self, d_k: int, d_v: int) -> tuple[tuple[int, ...], ...]:
        return ((d_k, d_v),)

    def parallel_form(
        self, q: Tensor, k: Tensor, v: Tensor, gates: tuple[Tensor, ...], state: State
    ) -> Result:
        out, end = linear_form.stretch(q, k, v, HeadDecay(gates[0]), state[0])
        return out, (end,)

    def chunk_form(
        self, q: Tensor, k: Tensor, v: Tensor, gates: tuple[Tensor, ...], state: State
    ) -> Result:
        out, end = linear_form.chunks(q, k, v, gates[0], HeadDecay, state[0], self.chunk_size)
        return out, (end,)

    def step_form(
        self, q: Tensor, k: Tensor, v: Tensor, gates: tuple[Tensor, ...], state: State
    ) -> Result:
        kept = gates[0].exp()[..., None, None]
        s = kept * state[0] + k[..., :, None] * v[..., None, :]
        return torch.matmul(q, s), (s,)
