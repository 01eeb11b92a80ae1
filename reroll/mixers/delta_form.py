"""Delta rules: a token overwrites what the state holds under its key.

S_t = A_t S_{t-1} + b_t k_t (v_t - k_t A_t S_{t-1})^T, o_t = q_t S_t, with a diagonal decay A_t.

The value that token t adds under its key is u_t = b_t (v_t - k_t A_t S_{t-1}), which depends on the
writes before it. Over a stretch of tokens that is one triangular system. Yang et al., 2024 (arXiv
2406.06484), section 3.2, and with decays 2024 (arXiv 2412.06464), section 3.3.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from reroll.mixers.base import Gates, Mixer, Prepared, Result, State
from reroll.mixers.decay import Decay, HeadDecay, MakeDecay, kept, products
from reroll.mixers.gates import Gate, strength_gate, wide
from reroll.mixers.linear_form import cut, joined
from reroll.mixers.trees import Tree
from reroll.rewrite.pipeline.options import option


def stretch(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Decay, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute all tokens at once.

    q [..., groups, time, d_k], k, v [..., time, d], beta [..., time].
    """
    out, u = reads(q, k, v, beta, decay, state)
    return out, decay.total.exp()[..., None] * state + decay.to_end(k).mT @ u


def reads(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Decay, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute what the tokens of a stretch read, and what they write under their keys.

    The tokens may be those of a tree. Parents come before their children, so its system is
    triangular as well.
    """
    held = decay.from_start(k) @ state
    u = solved(k, beta, decay, beta[..., None] * (v - held))
    return products(decay.scores(q, k), u) + products(decay.from_start(q), state), u


def chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    decay: MakeDecay,
    state: Tensor,
    size: int,
) -> tuple[Tensor, Tensor]:
    """Compute the same in chunks of `size` tokens. `log_decay`: [..., time] or [..., time, d_k].

    The system is first solved without the state, for the values and for the decayed keys, with
    which the state is multiplied later. Then the state goes through the chunks in order.
    """
    time = k.shape[2]
    q = cut(q, size, 3).transpose(2, 3)  # [batch, kv_heads, chunks, groups, size, d_k]
    k, v, beta, log_decay = (cut(t, size, 2) for t in (k, v, beta, log_decay))
    fade = decay(log_decay)
    held = torch.cat([v, fade.from_start(k)], -1)
    both = solved(k, beta, fade, beta[..., None] * held)
    u, w = both[..., : v.shape[-1]], both[..., v.shape[-1] :]
    left, ends = fade.total.exp()[..., None], fade.to_end(k)
    states, writes = [], []
    for i in range(k.shape[2]):
        states.append(state)
        writes.append(u[:, :, i] - w[:, :, i] @ state)
        state = left[:, :, i] * state + ends[:, :, i].mT @ writes[-1]
    written, before = torch.stack(writes, 2), torch.stack(states, 2)
    out = products(fade.scores(q, k), written) + products(fade.from_start(q), before)
    return joined(out, time), state


def step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, kept: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute one token; `kept` [batch, kv_heads, d_k or 1] is the decay of the state."""
    state = update(k, v, beta, kept[..., None] * state)
    return torch.matmul(q, state), state


def update(k: Tensor, v: Tensor, beta: Tensor, state: Tensor) -> Tensor:
    """Move what the state holds under `k` by the part `beta` towards `v`; return the new state."""
    held = torch.matmul(k[..., None, :], state)[..., 0, :]
    return state + k[..., :, None] * (beta[..., None] * (v - held))[..., None, :]


def solved(k: Tensor, beta: Tensor, decay: Decay, right: Tensor) -> Tensor:
    """Solve (I + A) u = right, with A_ij = beta_i k_i . k_j times the decay between them, j < i."""
    mutual = decay.scores((beta[..., None] * k).unsqueeze(-3), k, diagonal=-1).squeeze(-3)
    # `unitriangular` takes the diagonal as ones, whatever its entries are
    result: Tensor = torch.linalg.solve_triangular(mutual, right, upper=False, unitriangular=True)
    return result


class Delta(Mixer):
    """Base class of the delta rules: a log decay is their first gate, `beta` their last."""

    # over all tokens at once, and in chunks
    decays: ClassVar[tuple[MakeDecay, MakeDecay]] = HeadDecay, HeadDecay
    # a rounding error in a triangular system affects every later token
    chunks_wide = True

    negative: bool = option(
        False, help="let beta reach 2, so that a write can flip what it overwrites"
    )
    unit_keys: bool = option(
        True, help="scale queries and keys to length one; without it beta may make the state grow"
    )

    @property
    def unit_length(self) -> bool:
        return self.unit_keys

    @property
    def chunk_decay(self) -> MakeDecay:
        """How decays within a chunk are computed."""
        return self.decays[1]

    def state_shapes(self, d_k: int, d_v: int) -> tuple[tuple[int, ...], ...]:
        return ((d_k, d_v),)

    def write_flops(self, d_k: int, d_v: int) -> int:
        # reading under the key, writing, decay
        return 5 * d_k * d_v

    def strength(self, shape: tuple[int, ...] = ()) -> Gate:
        """Return the gate beta."""
        return strength_gate("beta", shape, 2.0 if self.negative else 1.0)

    def prepare(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates) -> Prepared:
        return (unit(q), unit(k), v, gates) if self.unit_keys else (q, k, v, gates)

    def parallel_form(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State) -> Result:
        out, end = stretch(q, k, v, gates[-1], self.decays[0](gates[0]), state[0])
        return out, (end,)

    def chunk_form(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State) -> Result:
        size = self.longest_chunk or self.chunk_size
        out, end = chunks(q, k, v, gates[-1], gates[0], self.chunk_decay, state[0], size)
        return out, (end,)

    def step_form(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State) -> Result:
        out, end = step(q, k, v, gates[-1], kept(gates[0], k), state[0])
        return out, (end,)

    def tree_form(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State, tree: Tree
    ) -> Tensor:
        return reads(q, k, v, gates[-1], self.decays[0](gates[0], tree), state[0])[0]


def unit(x: Tensor) -> Tensor:
    """Scale vectors to length one, with a small floor under the length."""
    x = wide(x)
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
