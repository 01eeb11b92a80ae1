"""Gates of mixers, such as decays and write strengths, and how their values are computed.

A gate tensor is [batch, kv_heads, time, *shape], in fp32. Ordinary operations compute it outside of
the mixer. A mixer declares for each gate how a pass computes it. `activation` maps a raw number of
a learned projection, and `inverse` gives the bias for a wanted value. `from_key` maps the key
projection, with no new weights: Liger's construction (arXiv 2503.01496), as in its paper or in its
released code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Role = Literal["decay", "rate", "write", "bonus", "key", "value"]
Map = Callable[[Tensor], Tensor]
T = TypeVar("T")

# Liger's released code divides the log of GLA's and GSA's gates by this; its paper does not
LIGER_NORMALISER = 16.0


@dataclass(frozen=True)
class Gate:
    """One gate of a mixer.

    Attributes:
        name: its name in the mixer.
        role: what it does. `decay` is the log of the part of the state that is kept, 0 or less.
            `rate` is that for a step of size one; the write gate is the size of the step. `write`
            is how strongly a token writes. `bonus` is what a token reads of its own write.
            `key` and `value` are a further key or value of the token.
        shape: sizes after [batch, kv_heads, time].
        low, high: the range of values that the mixer's equations allow.
        floor: lower values are raised to it by the mixer itself, in all forms, so that the matrix
            product of a chunk stays in range.
        neutral: the value at which a token leaves the state unchanged; padded tokens get it.
        constant: the same for all tokens, as a parameter is. Its tensor may have 1 in place of
            batch and time (`given_once`). Padded tokens keep it: other gates say that they write
            nothing.
        activation: from a raw number, such as a projection of the layer's input, to a value.
        inverse: from a value to the raw number; None where no initial value is chosen.
        usual: a constant to start from where no better one is known, if there is one.
        from_key: from the key projection [batch, kv_heads, time, d_k] before its rotary embedding
            to the gate, by the source of the formula: `paper` or `code`.
    """

    name: str
    role: Role
    shape: tuple[int, ...] = ()
    low: float = -math.inf
    high: float = math.inf
    floor: float | None = None
    neutral: float = 0.0
    constant: bool = False
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
    """Return the gate log decay = log sigmoid(raw) / normaliser, for each head or each channel."""
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
    """Return the gate write strength = sigmoid(raw) * top."""
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


def varying(declared: Sequence[Gate], gates: Sequence[T]) -> list[T]:
    """Return the gates that are not constant: those that wait with a token that is delayed."""
    return [x for gate, x in zip(declared, gates, strict=True) if not gate.constant]


def with_constant(declared: Sequence[Gate], gates: Sequence[T], changed: Sequence[T]) -> list[T]:
    """Return `gates` with `changed` in place of those that are not constant."""
    each = iter(changed)
    return [x if gate.constant else next(each) for gate, x in zip(declared, gates, strict=True)]


def given_once(gate: Tensor) -> bool:
    """Whether a gate is given once for all tokens: [1, kv_heads, 1, ...]."""
    return gate.shape[0] == gate.shape[2] == 1


def wide(x: Tensor) -> Tensor:
    """Convert to fp32; leave fp64 as it is."""
    return x if x.dtype == torch.float64 else x.float()


def pooled(k: Tensor) -> Tensor:
    """Average over the key's channels: one number for each head and token."""
    return wide(k).mean(-1)


def log_sigmoid(x: Tensor, normaliser: float = 1.0) -> Tensor:
    """Compute the log of sigmoid(x), divided by `normaliser`, in fp32."""
    return F.logsigmoid(wide(x)) / normaliser


def inverse_softplus(value: float) -> float:
    """Return the number whose softplus is `value`."""
    return value + math.log(-math.expm1(-value))


def logit(value: float) -> float:
    """Return the number whose sigmoid is `value`, clamped away from 0 and 1."""
    value = min(max(value, 1e-6), 1 - 1e-6)
    return math.log(value) - math.log1p(-value)
