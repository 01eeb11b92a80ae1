"""Declare a mixer's recurrence, so that kernels and exporters need not know its name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Core:
    """Linear recurrence of a mixer, S_t = A_t S_{t-1} + k_t w_t^T with o_t = q_t S_t.

    It starts after the mixer's `prepare`: after the feature map, or after scaling to length one. A
    kernel that runs this recurrence runs every mixer that declares a core.

    Attributes:
        decay: A_t is one for "none", otherwise exp of the first gate. That gate has a number for
            each head ("head") or for each channel of the key ("channel"). "selective": each number
            of the state decays by itself, exp of the first gate [d_v], which is the step size,
            times the second, the rates [d_k, d_v]; and w_t is v_t times the step size.
        delta: w_t = b_t (v_t - A_t S_{t-1} k_t) with the last gate b, instead of w_t = v_t.
        key: which key is used: k itself ("given"), k times the second gate ("gated"), or 1 - exp of
            the first gate ("forgotten").
        counts: whether values have a further channel of ones, which sums the weights.
    """

    decay: Literal["none", "head", "channel", "selective"]
    delta: bool = False
    key: Literal["given", "gated", "forgotten"] = "given"
    counts: bool = False

    @property
    def gate(self) -> int:
        """Number of the decay in kernels: 0 for none, 1 for heads, 2 for channels, 3 selective."""
        return ("none", "head", "channel", "selective").index(self.decay)

    @property
    def family(self) -> str:
        """Family of kernels that run it."""
        if self.decay == "selective":
            return "selective"
        return "delta" if self.delta else "diagonal"
