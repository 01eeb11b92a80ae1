"""RWKV-6 (Finch): a token reads the state before its own write, and that write by a bonus.

o_t = q_t (S_{t-1} + diag(u_t) k_t v_t^T), S_t = diag(exp g_t) S_{t-1} + k_t v_t^T, g = -exp(raw):
Peng et al., 2024 (arXiv 2404.05892), equations 18 and 19. RWKV has one bonus u for all tokens. With
u = 1 a token reads what it writes, and its decay acts one token later than in GLA.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from reroll.bounds import Range
from reroll.mixers import linear_form
from reroll.mixers.base import Gates, Result, State
from reroll.mixers.decay import ChannelDecay, FactoredDecay
from reroll.mixers.diagonal import ChannelDiagonal
from reroll.mixers.gates import Gate, wide
from reroll.mixers.trees import Tree
from reroll.rewrite.pipeline.options import option


class RWKV6(ChannelDiagonal):
    """RWKV-6: channel-wise decay, read before write, a bonus for the token itself."""

    name = "rwkv6"

    floor: float = option(-5.0, within=Range(below=0), help="log decays below are raised to it")

    def gates(self, d_k: int, d_v: int) -> tuple[Gate, ...]:
        size = self.features(d_k)
        decay = Gate(
            name="log_decay",
            role="decay",
            shape=(size,),
            high=0.0,
            floor=self.floor,
            activation=lambda raw: -wide(raw).exp(),
            inverse=lambda value: math.log(-value),
            from_key={"paper": lambda k: -wide(k).exp()} if size == d_k else {},
        )
        return decay, Gate(name="bonus", role="bonus", shape=(size,), usual=1.0)

    def default_scale(self, d_k: int) -> float:
        return 1.0

    def parallel_form(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State) -> Result:
        log_decay, bonus = gates
        before, bonus_output = _before(q, log_decay), _bonus_output(q, k, v, bonus)
        out, end = linear_form.stretch(before, k, v, ChannelDecay(log_decay), state[0], -1)
        return out + bonus_output, (end,)

    def chunk_form(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State) -> Result:
        log_decay, bonus = gates
        before, bonus_output = _before(q, log_decay), _bonus_output(q, k, v, bonus)
        out, end = linear_form.chunks(
            before, k, v, log_decay, FactoredDecay, state[0], self.longest_chunk, -1
        )
        return out + bonus_output, (end,)

    def step_form(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State) -> Result:
        log_decay, bonus = gates
        write = k[..., :, None] * v[..., None, :]
        out = torch.matmul(q, state[0] + bonus[..., None] * write)
        return out, (log_decay.exp()[..., None] * state[0] + write,)

    def tree_form(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State, tree: Tree
    ) -> Tensor:
        log_decay, bonus = gates
        before, bonus_output = _before(q, log_decay), _bonus_output(q, k, v, bonus)
        decay = ChannelDecay(log_decay, tree)
        return linear_form.reads(before, k, v, decay, state[0], -1) + bonus_output


def _before(q: Tensor, log_decay: Tensor) -> Tensor:
    """Multiply queries by the inverse of their own token's decay, in fp32."""
    return q * (-log_decay).exp().unsqueeze(2)


def _bonus_output(q: Tensor, k: Tensor, v: Tensor, bonus: Tensor) -> Tensor:
    """Compute what each token reads of its own write."""
    score = (q * (bonus * k).unsqueeze(2)).sum(-1, keepdim=True)
    return score * v.unsqueeze(2)
