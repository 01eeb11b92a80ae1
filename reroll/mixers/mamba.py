"""Mamba (the selective scan): every number of the state decays at a rate of its own.

S_t[n, d] = exp(dt_t[d] A[n, d]) S_{t-1}[n, d] + B_t[n] dt_t[d] x_t[d], y_t = C_t S_t, with k = B,
v = x, q = C: Gu and Dao, 2023 (arXiv 2312.00752), section 3.2 and algorithm 2. The rates A are
parameters, the step sizes dt are projected from the token. The skip D x, the gate silu(z), and the
bias and softplus of dt act on each token alone. They are ordinary operations of the program.

Decays are multiplied token by token and never divided by, so all of them are exact, however small.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from reroll.mixers.base import Gates, Mixer, Result, State
from reroll.mixers.core import Core
from reroll.mixers.gates import Gate, inverse_softplus, wide


class Mamba(Mixer):
    """Mamba: a decay for each number of the state, from a step size for each channel."""

    name = "mamba"
    core = Core("selective")
    # a sum over time, without matrix products between tokens
    chunks_wide = True

    def gates(self, d_k: int, d_v: int) -> tuple[Gate, ...]:
        dt = Gate(
            name="dt",
            role="write",
            shape=(d_v,),
            low=0.0,
            activation=lambda raw: F.softplus(wide(raw)),
            inverse=inverse_softplus,
            usual=1.0,
        )
        rate = Gate(
            name="rate",
            role="rate",
            shape=(d_k, d_v),
            high=0.0,
            constant=True,
            activation=lambda raw: -wide(raw).exp(),
            inverse=lambda value: math.log(-value),
        )
        return dt, rate

    def state_shapes(self, d_k: int, d_v: int) -> tuple[tuple[int, ...], ...]:
        return ((d_k, d_v),)

    def default_scale(self, d_k: int) -> float:
        return 1.0

    def write_flops(self, d_k: int, d_v: int) -> int:
        # the decay itself is a product and an exponential
        return 5 * d_k * d_v

    def parallel_form(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State) -> Result:
        log_decay, writes = _discrete(k, v, *gates)
        held = log_decay.cumsum(2).exp() * state[0][:, :, None]
        states = []
        for t in range(k.shape[2]):
            # each sum starts at token t: differences of sums from the first token would round away
            # what comes after a token that keeps next to nothing
            later = F.pad(log_decay[:, :, 1 : t + 1], (0, 0, 0, 0, 0, 1))
            kept = later.flip(2).cumsum(2).flip(2).exp()
            states.append((kept * writes[:, :, : t + 1]).sum(2) + held[:, :, t])
        out = torch.einsum("...gtk,...tkv->...gtv", q, torch.stack(states, 2))
        return out, (states[-1],)

    def chunk_form(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State) -> Result:
        (dt, rate), size, end = gates, self.chunk_size, state[0]
        pieces = [x.split(size, dim) for x, dim in ((q, 3), (k, 2), (v, 2), (dt, 2))]
        # one rate for all tokens stays one number
        rates = [rate] * len(pieces[1]) if rate.shape[2] == 1 else rate.split(size, 2)
        run: Callable[..., tuple[Tensor, Tensor]] = _chunk
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, dt, rate, end)):
            # the states of a chunk are computed again for its gradient, not kept
            run = partial(checkpoint, _chunk, use_reentrant=False, preserve_rng_state=False)
        outs = []
        for piece in zip(*pieces, rates, strict=True):
            out, end = run(*piece, end)
            outs.append(out)
        return torch.cat(outs, 3), (end,)

    def step_form(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State) -> Result:
        log_decay, write = _discrete(k, v, *gates)
        end = log_decay.exp() * state[0] + write
        return torch.matmul(q, end), (end,)


def _discrete(k: Tensor, v: Tensor, dt: Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
    """Return log decays and writes of tokens: [..., d_k, d_v] each."""
    return dt[..., None, :] * rate, k[..., :, None] * (dt * v)[..., None, :]


def _chunk(
    q: Tensor, k: Tensor, v: Tensor, dt: Tensor, rate: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the recurrence over a few tokens, of which all states are held at once."""
    log_decay, writes = _discrete(k, v, dt, rate)
    states = []
    for kept, write in zip(log_decay.exp().unbind(2), writes.unbind(2), strict=True):
        state = torch.addcmul(write, kept, state)
        states.append(state)
    return (q.transpose(2, 3) @ torch.stack(states, 2)).transpose(2, 3), state
