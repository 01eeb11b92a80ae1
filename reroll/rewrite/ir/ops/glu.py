"""Gated linear units."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("reroll::glu", mutates_args=())
def glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Compute the gated linear unit activation(gate) * up (Shazeer, 2020, arXiv 2002.05202)."""
    return activate(gate, activation) * up


@glu.register_fake
def _(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return torch.empty_like(gate)


def activate(x: Tensor, activation: str) -> Tensor:
    """Apply an activation function of `glu` by name."""
    if activation == "silu":
        return F.silu(x)
    if activation == "gelu":
        return F.gelu(x)
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if activation == "relu":
        return F.relu(x)
    if activation == "sigmoid":
        return torch.sigmoid(x)
    raise ValueError(f"unknown activation {activation!r}")


GLU = torch.ops.reroll.glu.default
