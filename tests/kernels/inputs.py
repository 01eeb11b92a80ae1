"""Inputs of the kernels, in memory that is poisoned wherever it is not theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reroll.mixers import Mixer

NAN = float("nan")


def poisoned(x: Tensor) -> Tensor:
    """The same tensor as a view into a larger one that is not a number everywhere else."""
    around = x.new_full([n + 2 for n in x.shape[:-1]] + [x.shape[-1] + 3], NAN)
    inside = around[tuple(slice(1, 1 + n) for n in x.shape)]
    inside.copy_(x)
    return inside


class Call(NamedTuple):
    """Arguments of a mixer's form."""

    q: Tensor
    k: Tensor
    v: Tensor
    gates: tuple[Tensor, ...]
    state: Tensor

    def leaves(self) -> list[Tensor]:
        return [t.detach().requires_grad_() for t in (*self[:3], *self.gates, self.state)]


def draw(
    mixer: Mixer, time: int, batch: int = 1, heads: int = 2, groups: int = 1, d_k: int = 16,
    d_v: int = 16, dtype: torch.dtype = torch.float32, sequences: int | None = None,
    spread: float = 1.0,
) -> Call:  # fmt: skip
    """Random inputs with the gates that a mixer makes of random numbers times `spread`."""
    seed = torch.Generator().manual_seed(time + 7 * heads)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=seed)

    q, k, v = (
        poisoned(random(batch, n, time, d).to(dtype))
        for n, d in ((heads * groups, d_k), (heads, d_k), (heads, d_v))
    )
    gates = tuple(
        g.activation(spread * random(batch, heads, time, *g.shape)) for g in mixer.gates(d_k, d_v)
    )
    gates = tuple(
        g if m.floor is None else g.clamp(min=m.floor)
        for g, m in zip(gates, mixer.gates(d_k, d_v), strict=True)
    )
    return Call(q, k, v, gates, random(sequences or batch, heads, d_k, d_v))


def with_gradients(form: Callable[..., Any], call: Call) -> dict[str, Tensor]:
    """What form(q, k, v, gates, state) returns, and the gradient of all of it by everything."""
    q, k, v, *gates, state = leaves = call.leaves()
    out, end = form(q, k, v, tuple(gates), state)
    seed = torch.Generator().manual_seed(1)
    loss = sum((t.float() * torch.randn(t.shape, generator=seed)).sum() for t in (out, end))
    names = ["q", "k", "v", *(f"gate {i}" for i in range(len(gates))), "state"]
    found = torch.autograd.grad(loss, leaves)
    return {"out": out, "end": end} | dict(zip(names, found, strict=True))
