"""Gates: what a mixer is driven by beside queries, keys and values, and how each one comes about.

A gate tensor is [batch, kv_heads, time, *shape], in fp32, and is computed by ordinary operations
outside of the mixer. A mixer declares for each gate where its values come from when a pass makes
one: from a raw number of a learned projection (`activation`, and `inverse` for the bias that gives
a wanted value), or from the key projection with no new weights (`from_key`, Liger's construction,
arXiv 2503.01496, as its paper and as its released code have it).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Role = Literal["decay", "write", "bonus", "key", "value"]
Map = Callable[[Tensor], Tensor]

# Liger's released code divides the log of GLA's and GSA's gates by this; its paper does not
LIGER_NORMALISER = 16.0


@dataclass(frozen=True)
class Gate:
    """One gate of a mixer.

    Attributes:
        name: what the mixer calls it.
        role: what it does: `decay` (log of what is kept of the state, 0 or less), `write` (how
            strongly a token writes), `bonus` (what a token reads of itself), or a further `key` or
            `value` of the token.
        shape: sizes after [batch, kv_heads, time].
        low, high: the range of values that the mathematics allows.
        floor: values below are raised to it by the mixer itself, in all forms, so that the one
            matrix product of a chunk stays in range.
        neutral: the value at which a token leaves the state alone; padded tokens get it.
        activation: from a raw number, such as a projection of the layer's input, to a value.
        inverse: from a value to the raw number; None where nobody wants to choose one.
        usual: a constant to start from where nothing better is known, if there is one.
        from_key: from the key projection [batch, kv_heads, time, d_k] before its rotary embedding
            to the gate, by where the formula is from: `paper` or `code`.
    """

    name: str
    role: Role
    shape: tuple[int, ...] = ()
    low: float = -math.inf
    high: float = math.inf
    floor: float | None = None
    neutral: float = 0.0
    activation: Map = lambda raw: raw
    inverse: Callable[[float], float] | None = None
    usual: float | None = None
    from_key: Mapping[str, Map] = field(default_factory=dict)


def decay_gate(
    shape: tuple[int, ...] = (),
    normaliser: float = 1.0,
    floor: float | None = None,
    from_key: Mapping[str, Map] | None = None,
) -> Gate:
    """The log decay of a state: log sigmoid(raw) / normaliser, for each head or each channel."""
    return Gate(
        name="log_decay",
        role="decay",
        shape=shape,
        high=0.0,
        floor=floor,
        activation=lambda raw: F.logsigmoid(wide(raw)) / normaliser,
        inverse=lambda value: logit(math.exp(value * normaliser)),
        from_key=from_key or {},
    )


def strength_gate(name: str = "beta", shape: tuple[int, ...] = (), top: float = 1.0) -> Gate:
    """How strongly a token writes: sigmoid(raw) * top."""
    return Gate(
        name=name,
        role="write",
        shape=shape,
        low=0.0,
        high=top,
        activation=lambda raw: wide(raw).sigmoid() * top,
        inverse=lambda value: logit(value / top),
        usual=0.5,
    )


def wide(x: Tensor) -> Tensor:
    """At least fp32."""
    return x if x.dtype == torch.float64 else x.float()


def pooled(k: Tensor) -> Tensor:
    """One number for each head and token: the mean over the key's channels."""
    return wide(k).mean(-1)


def log_sigmoid(x: Tensor, normaliser: float = 1.0) -> Tensor:
    """The log of sigmoid(x), divided by `normaliser`, in fp32."""
    return F.logsigmoid(wide(x)) / normaliser


def inverse_softplus(value: float) -> float:
    """The number whose softplus is `value`."""
    return value + math.log(-math.expm1(-value))


def logit(value: float) -> float:
    """The number whose sigmoid is `value`, which is kept off 0 and 1."""
    value = min(max(value, 1e-6), 1 - 1e-6)
    return math.log(value) - math.log1p(-value)
