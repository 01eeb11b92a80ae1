"""mLSTM, the matrix memory of xLSTM: exponential input gates, kept in range by a running maximum.

m_t = max(f_t + m_{t-1}, i_t), with f and i the logs of the gates;
C_t = exp(f_t + m_{t-1} - m_t) C_{t-1} + exp(i_t - m_t) k_t v_t^T, n_t likewise with k_t alone;
o_t = q_t C_t / max(|q_t . n_t|, exp(-m_t)): Beck et al., 2024 (arXiv 2405.04517), equations 19 to
27; in chunks, 2025 (arXiv 2503.13427). C and n are the true sums divided by exp(m), so what comes
out does not depend on m.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reroll.mixers.base import Gates, Mixer, Result, State
from reroll.mixers.decay import products
from reroll.mixers.gates import Gate, decay_gate, log_sigmoid, pooled
from reroll.mixers.linear_form import chain, counted, cut, joined, read
from reroll.mixers.trees import Tree

# added to the denominator, as in xLSTM-7B
EPS = 1e-6


class MLSTM(Mixer):
    """mLSTM: exponential writes, normalised, with a maximum that keeps them in range."""

    name = "mlstm"

    def gates(self, d_k: int, d_v: int) -> tuple[Gate, ...]:
        forget = decay_gate(from_key={"paper": lambda k: log_sigmoid(pooled(k))})
        # the log of a write strength, unbounded
        write = Gate(
            name="log_write",
            role="write",
            neutral=-torch.inf,
            inverse=lambda value: value,
            usual=0.0,
        )
        return forget, write

    def state_shapes(self, d_k: int, d_v: int) -> tuple[tuple[int, ...], ...]:
        return ((d_k, d_v), (d_k,), ())

    def parallel_form(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State) -> Result:
        c, n, m = state
        stretch = _Stretch(gates[0], gates[1])
        tops, start = stretch.tops(m), torch.cat([c, n[..., None]], -1)
        end = tops[..., -1]
        after = stretch.left(m, tops)[..., -1, None, None] * start
        after = after + (k * stretch.writes(end)[..., None]).mT @ counted(v)
        out = self.reads(q, k, v, stretch, state)
        return out, (after[..., :-1], after[..., -1], end)

    def tree_form(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State, tree: Tree
    ) -> Tensor:
        return self.reads(q, k, v, _Stretch(gates[0], gates[1], tree), state)

    def reads(self, q: Tensor, k: Tensor, v: Tensor, stretch: _Stretch, state: State) -> Tensor:
        """Compute what the tokens of a stretch read, all at once."""
        c, n, m = state
        tops = stretch.tops(m)
        sums = products(q @ k.mT[:, :, None] * stretch.weights(tops).unsqueeze(-3), counted(v))
        start = torch.cat([c, n[..., None]], -1)
        sums = sums + products(q * stretch.left(m, tops).unsqueeze(-2).unsqueeze(-1), start)
        return _read(sums, tops)

    def chunk_form(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State) -> Result:
        time, dtype = k.shape[2], q.dtype
        c, n, m = state
        q = cut(q, self.chunk_size, 3).transpose(2, 3)
        k, v = (cut(t, self.chunk_size, 2) for t in (k, counted(v)))
        stretch = _Stretch(
            cut(gates[0], self.chunk_size, 2), cut(gates[1], self.chunk_size, 2, -torch.inf)
        )
        ends = stretch.ends(m)  # [batch, kv_heads, chunks + 1]
        before, after = ends[..., :-1], ends[..., 1:]
        tops = stretch.tops(before)
        writes = ((k * stretch.writes(after)[..., None]).to(dtype).mT @ v).to(c.dtype)
        total = stretch.sums[..., -1] + before - after
        states, end = chain(writes, total[..., None], torch.cat([c, n[..., None]], -1))
        scores = products(q, k.mT) * stretch.weights(tops).unsqueeze(-3)
        faded = q * stretch.left(before, tops).unsqueeze(-2).unsqueeze(-1)
        # fp32: the last channel is a divisor, which must not be rounded
        sums = read(scores, v.to(c.dtype), faded, states)
        out = joined(_read(sums, tops), time)
        return out, (end[..., :-1], end[..., -1], ends[..., -1])

    def step_form(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State) -> Result:
        c, n, m = state
        forget, write = gates
        top = torch.maximum(forget + m, write)
        kept, new = (forget + m - top).exp()[..., None], (write - top).exp()[..., None]
        n = kept * n + new * k
        c = kept[..., None] * c + (new * k)[..., :, None] * v[..., None, :]
        below = (q @ n[..., None]).abs().maximum((-top).exp()[..., None, None])
        return q @ c / (below + EPS), (c, n, top)


class _Stretch:
    """Sums of log gates over a stretch [..., time], and weights relative to a running maximum.

    With a `tree`, both run along the path to each token.
    """

    def __init__(self, forget: Tensor, write: Tensor, tree: Tree | None = None) -> None:
        self.tree = tree
        self.sums = forget.cumsum(-1) if tree is None else tree.sums(forget[..., None])[..., 0]
        self.write = write

    def tops(self, before: Tensor) -> Tensor:
        """Compute the running maximum m at each token, from that before the stretch."""
        new = self.write - self.sums
        if self.tree is None:
            highest = new.cummax(-1).values
        else:
            hidden = ~self.tree.ancestors
            highest = new[..., None, :].masked_fill(hidden, -torch.inf).amax(-1)
        return self.sums + torch.maximum(highest, before[..., None])

    def ends(self, before: Tensor) -> Tensor:
        """Compute the running maximum before the first of several stretches, and after each."""
        new = (self.sums[..., -1:] - self.sums + self.write).amax(-1)
        tops = [before]
        for i in range(new.shape[-1]):
            tops.append(torch.maximum(tops[-1] + self.sums[..., i, -1], new[..., i]))
        return torch.stack(tops, -1)

    def weights(self, tops: Tensor) -> Tensor:
        """Compute the weight of token j's write at token i >= j: [..., time, time]."""
        between = self.sums[..., :, None] - self.sums[..., None, :] + self.write[..., None, :]
        if self.tree is None:
            causal = torch.ones_like(between[(0,) * (between.dim() - 2)], dtype=torch.bool).tril()
        else:
            causal = self.tree.ancestors
        return (between - tops[..., None]).masked_fill(~causal, -torch.inf).exp()

    def left(self, before: Tensor, tops: Tensor) -> Tensor:
        """Compute the weight at each token of the state before the stretch: [..., time]."""
        return (self.sums + before[..., None] - tops).exp()

    def writes(self, end: Tensor) -> Tensor:
        """Compute the weight of each token's write in the state after the stretch: [..., time]."""
        return (self.sums[..., -1:] - self.sums + self.write - end[..., None]).exp()


def _read(sums: Tensor, tops: Tensor) -> Tensor:
    below = sums[..., -1:].abs().maximum((-tops).exp().unsqueeze(-2)[..., None])
    return sums[..., :-1] / (below + EPS)
