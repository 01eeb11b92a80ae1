"""Linear recurrences S_t = A_t S_{t-1} + k_t v_t^T, o_t = q_t S_t, with a diagonal A_t.

One stretch of tokens as matrix products, and a sequence as stretches chained by the state: Yang et
al., 2023 (arXiv 2312.06635), section 4; Dao and Gu, 2024 (arXiv 2405.21060), section 6.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from reroll.mixers.decay import Decay, MakeDecay, products


def stretch(
    q: Tensor, k: Tensor, v: Tensor, decay: Decay, state: Tensor, diagonal: int = 0
) -> tuple[Tensor, Tensor]:
    """Compute all tokens at once: reads of the others' writes, and of the state before them.

    q [..., groups, time, d_k], k [..., time, d_k], v [..., time, d_v], state [..., d_k, d_v]. With
    `diagonal` -1 a token does not read its own write.
    """
    out = reads(q, k, v, decay, state, diagonal)
    return out, decay.total.exp()[..., None] * state + decay.to_end(k).mT @ v


def reads(
    q: Tensor, k: Tensor, v: Tensor, decay: Decay, state: Tensor, diagonal: int = 0
) -> Tensor:
    """Compute what the tokens of a stretch read, whose nodes may be those of a tree."""
    return products(decay.scores(q, k, diagonal), v) + products(decay.from_start(q), state)


def chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    decay: MakeDecay,
    state: Tensor,
    size: int,
    diagonal: int = 0,
    wide: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute the same in chunks of `size` tokens. `log_decay`: [..., time] or [..., time, d_k].

    With `wide` the output is not rounded to the dtype of the inputs: it has sums that divide
    others.
    """
    time, dtype = k.shape[2], k.dtype
    q, k, v, log_decay = (cut(t, size, dim) for t, dim in ((q, 3), (k, 2), (v, 2), (log_decay, 2)))
    q = q.transpose(2, 3)  # [batch, kv_heads, chunks, groups, size, d_k]
    fade = decay(log_decay)
    writes = fade.to_end(k).to(dtype).mT @ v  # [batch, kv_heads, chunks, d_k, d_v]
    if wide:
        writes, v = writes.to(state.dtype), v.to(state.dtype)
    states, end = chain(writes, fade.total, state)
    out = read(fade.scores(q, k, diagonal), v, fade.from_start(q), states)
    return joined(out, time), end


def read(scores: Tensor, v: Tensor, q: Tensor, states: Tensor) -> Tensor:
    """Compute scores @ v + q @ states as one product, rounded once, to the dtype of `v`."""
    dtype = v.dtype
    left = torch.cat([scores.to(dtype), q.to(dtype)], -1)
    return products(left, torch.cat([v, states], -2))


def step(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Compute one token; `kept` [batch, kv_heads, d_k or 1] is the decay of the state."""
    state = kept[..., None] * state + k[..., :, None] * v[..., None, :]
    return torch.matmul(q, state), state


def counted(v: Tensor) -> Tensor:
    """Append a channel of ones to values, which sums the weights of the keys."""
    return torch.cat([v, torch.ones_like(v[..., :1])], -1)


def chain(writes: Tensor, total: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return the state before each chunk, in the dtype of the writes, and the one after the last.

    `writes` [batch, kv_heads, chunks, d_k, d_v] is what each chunk adds. `total` [batch, kv_heads,
    chunks, d_k or 1] is the log decay over each chunk.
    """
    kept = total.exp()[..., None]
    before = []
    for i in range(writes.shape[2]):
        before.append(state.to(writes.dtype))
        state = kept[:, :, i] * state + writes[:, :, i]
    return torch.stack(before, 2), state


def cut(x: Tensor, size: int, dim: int, fill: float = 0.0) -> Tensor:
    """Reshape time to [chunks, size], padded with tokens of `fill`, which write nothing."""
    missing = -x.shape[dim] % size
    if missing:
        x = F.pad(x, (0, 0) * (x.dim() - 1 - dim) + (0, missing), value=fill)
    return torch.unflatten(x, dim, (-1, size))


def joined(out: Tensor, time: int) -> Tensor:
    """Reshape [batch, kv_heads, chunks, groups, size, d_v] to [..., groups, time, d_v]."""
    return out.transpose(2, 3).flatten(3, 4)[..., :time, :]
