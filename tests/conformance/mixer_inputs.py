"""Random inputs of mixers, and how results are compared."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from reroll.mixers import Mixer, State
from reroll.rewrite.analysis import tolerances

BATCH, HEADS, KV_HEADS, TIME, D_K, D_V = 2, 4, 2, 21, 6, 5

# the parents of tokens: a chain, a star, and branches of several lengths from several roots
TREES = [[-1, 0, 1, 2, 3], [-1, -1, -1], [-1, -1, 0, 1, 1, 2, 4, 4, 5, 3, 9, 10]]


class Inputs(NamedTuple):
    """What a mixer takes; `state` is one that a few tokens have left behind."""

    q: Tensor
    k: Tensor
    v: Tensor
    gates: tuple[Tensor, ...]
    state: State

    def at(self, when: Any, rows: Any = slice(None)) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """The tokens of a slice of time."""
        q, k, v = (t[rows, :, when] for t in (self.q, self.k, self.v))
        return q, k, v, [g[rows, :, when] for g in self.gates]

    def tensors(self) -> list[Tensor]:
        return [self.q, self.k, self.v, *self.gates, *self.state]


def draw(
    mixer: Mixer,
    dtype: torch.dtype = torch.float64,
    time: int = TIME,
    heads: int = HEADS,
    seed: int = 0,
) -> Inputs:
    """Random inputs, with gates as the mixer's own activations make them."""
    make_random = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=make_random)

    def tokens(count: int) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        q, k, v = (random(BATCH, n, count, d).to(dtype)
                   for n, d in ((heads, D_K), (KV_HEADS, D_K), (KV_HEADS, D_V)))  # fmt: skip
        gates = [
            g.activation(random(BATCH, KV_HEADS, count, *g.shape).to(wide))
            for g in mixer.gates(D_K, D_V)
        ]
        return q, k, v, tuple(gates)

    _, state = mixer.recur(*tokens(3))
    q, k, v, gates = tokens(time)
    return Inputs(q, k, v, gates, tuple(s.detach() for s in state))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    error = tolerances.relative_rms(actual, expected)
    assert error <= tolerance, f"{what}: relative error {error:.2e} above {tolerance:.0e}"
