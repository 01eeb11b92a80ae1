"""Gated slot attention: softmax attention over a fixed number of slots that decay.

K_t = diag(exp g_t) K_{t-1} + s_t k_t^T, V_t = diag(exp g_t) V_{t-1} + s_t v_t^T with s = 1 - exp g;
o_t = softmax(K_t q_t)^T V_t: Zhang et al., 2024 (arXiv 2409.07146), equation 7. K and V have a row
for each slot.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reroll.bounds import SIZE, Range
from reroll.mixers import linear_form
from reroll.mixers.base import Gates, Mixer, Result, State
from reroll.mixers.decay import ChannelDecay, FactoredDecay, bounded_size, products
from reroll.mixers.gates import LIGER_NORMALISER, Gate, Map, decay_gate, log_sigmoid, wide
from reroll.mixers.linear_form import chain, cut, joined
from reroll.mixers.trees import Tree
from reroll.rewrite.pipeline.options import option

# lower bound of a divisor: the sum of weights is 0 before the first token
NOTHING = 1e-30


class GSA(Mixer):
    """Gated slot attention: softmax over slots, each with a key and a value that decay."""

    name = "gsa"
    divides = "log_mass"
    has_slots = True

    slots: int = option(64, within=SIZE, help="slots of the state")
    floor: float = option(
        -2.5,
        within=Range(below=0),
        help="lower bound of log decays; a higher one allows longer chunks",
    )
    log_mass: bool = option(
        False, help="return the log of the sum of weights in the last channel, where values are one"
    )

    def gates(self, d_k: int, d_v: int) -> tuple[Gate, ...]:
        liger: dict[str, Map] = {
            "paper": lambda k: log_sigmoid(self.pool(k)),
            "code": lambda k: log_sigmoid(self.pool(k), LIGER_NORMALISER),
        }
        return (decay_gate((self.slots,), 8.0, self.floor, liger),)

    def pool(self, k: Tensor) -> Tensor:
        """Average the channels of a key to one number for each slot."""
        averaged: Tensor = torch.nn.functional.adaptive_avg_pool1d(k.flatten(0, 1), self.slots)
        return averaged.view(*k.shape[:-1], self.slots)

    def default_scale(self, d_k: int) -> float:
        return 1.0

    def state_shapes(self, d_k: int, d_v: int) -> tuple[tuple[int, ...], ...]:
        return ((self.slots, d_k), (self.slots, d_v))

    def parallel_form(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State) -> Result:
        decay, s = ChannelDecay(gates[0]), -gates[0].expm1()
        scores = self.scores(q, k, s, decay, state[0])
        keys = decay.total.exp()[..., None] * state[0] + decay.to_end(s).mT @ k
        out, values = linear_form.stretch(scores.softmax(-1), s, v, decay, state[1])
        return self.weighed(out, scores), (keys, values)

    def chunk_form(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State) -> Result:
        time, dtype, size = k.shape[2], q.dtype, bounded_size(self.chunk_size, self.floor)
        log_decay = gates[0]
        s = (-log_decay.expm1()).to(dtype)
        rows, decay = cut(q, size, 3).transpose(2, 3), FactoredDecay(cut(log_decay, size, 2))
        columns, slots = cut(k, size, 2), cut(s, size, 2)
        writes = decay.to_end(slots).to(dtype).mT @ columns
        states, keys = chain(writes, decay.total, state[0])
        decayed = products(products(rows, columns.mT).tril(), (slots * decay.fall).to(dtype))
        scores = decayed * decay.rise.unsqueeze(-3)
        scores = scores + decay.from_start(products(rows, states.mT))
        weights = joined(scores.softmax(-1).to(dtype), time)
        out, values = linear_form.chunks(weights, s, v, log_decay, lambda _: decay, state[1], size)
        return self.weighed(out, joined(scores, time)), (keys, values)

    def step_form(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State) -> Result:
        kept, s = gates[0].exp()[..., None], -gates[0].expm1()[..., None]
        keys = kept * state[0] + s * k[..., None, :]
        values = kept * state[1] + s * v[..., None, :]
        scores = q @ keys.mT
        return self.weighed(scores.softmax(-1) @ values, scores), (keys, values)

    def tree_form(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State, tree: Tree
    ) -> Tensor:
        decay, s = ChannelDecay(gates[0], tree), -gates[0].expm1()
        scores = self.scores(q, k, s, decay, state[0])
        return self.weighed(linear_form.reads(scores.softmax(-1), s, v, decay, state[1]), scores)

    def scores(self, q: Tensor, k: Tensor, s: Tensor, decay: ChannelDecay, keys: Tensor) -> Tensor:
        """Compute the scores of all slots at all tokens at once: [..., groups, time, slots]."""
        scores = torch.einsum(
            "...gij,...ijm,...jm->...gim", q @ k.mT[:, :, None], decay.between(), s
        )
        return scores + decay.from_start(products(q, keys.mT))

    def weighed(self, out: Tensor, scores: Tensor) -> Tensor:
        """Compute the mean over written tokens and the log of the sum of their weights.

        The last channel of `out` is the part of the softmax weights that lies on written content.
        An empty slot has a score, but no value. Without `log_mass`, `out` is returned as it is.
        """
        if not self.log_mass:
            return out
        written = wide(out[..., -1:]).clamp(min=NOTHING)
        mass = wide(scores).logsumexp(-1, keepdim=True) + written.log()
        return torch.cat((wide(out[..., :-1]) / written, mass), -1)
