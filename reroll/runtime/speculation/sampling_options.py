"""How tokens are drawn, whatever computes it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are drawn, as in transformers; by default the likeliest is taken.

    Attributes:
        temperature: of the softmax; None takes the likeliest token.
        top_k: draw from so many likeliest tokens; 0 for all.
        top_p: draw from the likeliest tokens with this share of the probability.
    """

    temperature: float | None = None
    top_k: int = 0
    top_p: float = 1.0
