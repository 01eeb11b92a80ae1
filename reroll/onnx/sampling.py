"""Choosing tokens from logits, and keeping drafted ones: NumPy's side of `runtime.speculation`.

See `reroll.runtime.speculation.sampling`, whose distributions these are.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from reroll.runtime.speculation.sampling_options import SamplingOptions

Array = Any


class Sampling(SamplingOptions):
    """Draws tokens with NumPy."""

    def distribution(self, logits: Array) -> Array:
        """Return the probabilities [tokens, vocabulary] of logits of that shape."""
        if self.temperature is None:
            found = np.zeros(logits.shape, np.float64)
            np.put_along_axis(found, logits.argmax(-1)[:, None], 1.0, -1)
            return found
        scores = logits.astype(np.float64) / self.temperature
        if self.top_k:
            count = min(self.top_k, scores.shape[-1])
            least = np.partition(scores, -count, -1)[:, -count, None]
            scores = np.where(scores < least, -np.inf, scores)
        made = _softmax(scores)
        if self.top_p < 1:
            order = made.argsort(-1)
            # the least likely, up to what they may lose together; the likeliest stays
            small = np.take_along_axis(made, order, -1).cumsum(-1) <= 1 - self.top_p
            small[:, -1] = False
            dropped = np.zeros_like(small)
            np.put_along_axis(dropped, order, small, -1)
            made = _softmax(np.where(dropped, -np.inf, scores))
        return made


def _softmax(scores: Array) -> Array:
    made = np.exp(scores - scores.max(-1, keepdims=True))
    return made / made.sum(-1, keepdims=True)


def draw(distribution: Array, random: np.random.Generator) -> int:
    """Draw a token of one distribution [vocabulary]."""
    if distribution.max() == 1:
        return int(distribution.argmax())
    total = distribution.cumsum()
    return int(np.searchsorted(total, random.random() * total[-1], side="right"))


def kept(proposed: list[int], q: Array | None, p: Array, random: np.random.Generator) -> list[int]:
    """Return the tokens that follow: those kept of `proposed`, and one of the model's own.

    `q` [k, vocabulary] are the distributions that they were drawn from, None where nothing else
    could have been proposed; `p` [k + 1, vocabulary] are the model's. Leviathan et al. (arXiv
    2211.17192), algorithm 1.
    """
    for place, token in enumerate(proposed):
        chance = p[place, token] / (1.0 if q is None else q[place, token])
        if chance >= 1 or random.random() < chance:
            continue
        rest = p[place].copy()
        if q is None:
            rest[token] = 0.0
        else:
            rest = np.maximum(rest - q[place], 0.0)
        # by rounding, nothing may be left where both are the same
        rest = rest if rest.sum() > 0 else p[place]
        return [*proposed[:place], draw(rest / rest.sum(), random)]
    return [*proposed, draw(p[-1], random)]
