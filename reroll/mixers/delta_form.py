"""Delta rules: a token first takes out what the state holds under its key, then writes.

S_t = A_t S_{t-1} + b_t k_t (v_t - k_t A_t S_{t-1})^T, o_t = q_t S_t, with a diagonal decay A_t.
What token t really writes under its key, u_t = b_t (v_t - k_t A_t S_{t-1}), depends on the writes
before it; over a stretch of tokens that is one triangular system. Yang et al., 2024 (arXiv
2406.06484), section 3.2, and with decays 2024 (arXiv 2412.06464), section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from reroll.mixers.base import Mixer
from reroll.mixers.decay import Decay, products
from reroll.mixers.gates import Gate, strength_gate, wide
from reroll.mixers.linear_form import cut, joined
from reroll.rewrite.pipeline.options import option


def stretch(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Decay, state: Tensor
) -> tuple[Tensor, Tensor]:
    """All tokens at once. q [..., groups, time, d_k], k, v [..., time, d], beta [..., time]."""
    held = decay.from_start(k) @ state
    u = solved(k, beta, decay, beta[..., None] * (v - held))
    out = products(decay.scores(q, k), u) + products(decay.from_start(q), state)
    return out, decay.total.exp()[..., None] * state + decay.to_end(k).mT @ u


def chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    decay: Callable[[Tensor], Decay],
    state: Tensor,
    size: int,
) -> tuple[Tensor, Tensor]:
    """The same in chunks of `size` tokens. `log_decay`: [..., time] or [..., time, d_k].

    The system is solved without the state, for the values and for what a state would hold under
    the keys; then the state goes through the chunks.
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
    """One token; `kept` [batch, kv_heads, d_k or 1] is what stays of the state."""
    state = update(k, v, beta, kept[..., None] * state)
    return torch.matmul(q, state), state


def update(k: Tensor, v: Tensor, beta: Tensor, state: Tensor) -> Tensor:
    """The state after what it holds under `k` went `beta` of the way to `v`."""
    held = torch.matmul(k[..., None, :], state)[..., 0, :]
    return state + k[..., :, None] * (beta[..., None] * (v - held))[..., None, :]


def solved(k: Tensor, beta: Tensor, decay: Decay, right: Tensor) -> Tensor:
    """(I + A)^-1 right, where A_ij = beta_i k_i . k_j with what fades between them, j < i."""
    mutual = decay.scores((beta[..., None] * k).unsqueeze(-3), k, diagonal=-1).squeeze(-3)
    # the diagonal is taken as ones, whatever stands there
    result: Tensor = torch.linalg.solve_triangular(mutual, right, upper=False, unitriangular=True)
    return result


class Delta(Mixer):
    """What the delta rules have in common; `beta` is their last gate."""

    # what is rounded in a triangular system ends up in every token after it
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

    def state_shapes(self, d_k: int, d_v: int) -> tuple[tuple[int, ...], ...]:
        return ((d_k, d_v),)

    def write_flops(self, d_k: int, d_v: int) -> int:
        # reading under the key, writing, decay
        return 5 * d_k * d_v

    def strength(self, shape: tuple[int, ...] = ()) -> Gate:
        """The gate beta."""
        return strength_gate("beta", shape, 2.0 if self.negative else 1.0)

    def prepare(
        self, q: Tensor, k: Tensor, v: Tensor, gates: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        return (unit(q), unit(k), v, gates) if self.unit_keys else (q, k, v, gates)


def unit(x: Tensor) -> Tensor:
    """Vectors of length one, up to a small floor under the length."""
    x = wide(x)
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
