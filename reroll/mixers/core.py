"""What a mixer declares about itself, so that kernels and exporters need not know its name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Core:
    """A mixer as one linear recurrence, S_t = A_t S_{t-1} + k_t w_t^T with o_t = q_t S_t.

    It begins after queries and keys have gone through the mixer's feature map, or have been brought
    to length one. Whatever runs this recurrence runs every mixer that declares a core.

    Attributes:
        decay: A_t is one ("none"), or exp of the first gate, which has a number for each head
            ("head") or for each channel of the key ("channel").
        delta: w_t = b_t (v_t - A_t S_{t-1} k_t) with the last gate b, in the place of w_t = v_t.
        key: what the key becomes: stays as it is ("given"), times the second gate ("gated"), or
            1 - exp of the first gate in its place ("forgotten").
        counts: whether values have a further channel of ones, in which the weights add up.
    """

    decay: Literal["none", "head", "channel"]
    delta: bool = False
    key: Literal["given", "gated", "forgotten"] = "given"
    counts: bool = False

    @property
    def gate(self) -> int:
        """The kernels' number for the decay: 0 for none, 1 for heads, 2 for channels."""
        return ("none", "head", "channel").index(self.decay)

    @property
    def family(self) -> str:
        """The family of kernels that run it."""
        return "delta" if self.delta else "diagonal"
