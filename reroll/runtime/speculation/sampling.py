"""Speculative sampling: drafted tokens are kept or replaced so that the model's distribution stays.

A drafted token x is kept with probability min(1, p(x) / q(x)), where q is the draft's distribution
and p the model's. The first that is not kept is drawn anew from max(p - q, 0), normalised, and what
was drafted behind it is dropped: Leviathan et al. (arXiv 2211.17192), algorithm 1. Greedy decoding
is the case of distributions with one token each.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from reroll.runtime.speculation.sampling_options import SamplingOptions


class Sampling(SamplingOptions):
    """Draws tokens with PyTorch."""

    @cached_property
    def _warpers(self) -> Any:
        warpers: list[Any] = [TemperatureLogitsWarper(float(self.temperature or 1.0))]
        warpers += [TopKLogitsWarper(self.top_k)] if self.top_k else []
        warpers += [TopPLogitsWarper(self.top_p)] if self.top_p < 1 else []
        return LogitsProcessorList(warpers)

    def distribution(self, logits: Tensor) -> Tensor:
        """Return the probabilities [tokens, vocabulary] in fp32 of logits of that shape."""
        if self.temperature is None:
            return one_hot(logits.argmax(-1), logits.shape[-1])
        ids: Any = None
        scores: Tensor = self._warpers(ids, logits.float())
        return scores.softmax(-1)


GREEDY = Sampling()


def one_hot(tokens: Tensor, vocabulary: int) -> Tensor:
    """Return distributions [tokens, vocabulary] that have one token each."""
    return F.one_hot(tokens, vocabulary).float()


def draw(distribution: Tensor) -> Tensor:
    """Draw a token of each distribution [tokens, vocabulary]: [tokens]."""
    if bool((distribution.amax(-1) == 1).all()):
        return distribution.argmax(-1)
    return torch.multinomial(distribution, 1).squeeze(-1)


def kept(proposed: Tensor, q: Tensor, p: Tensor) -> Tensor:
    """Return the tokens that follow: those kept of `proposed` [k], and one of the model's own.

    `q` [k, vocabulary] are the distributions that they were drawn from, and `p`
    [k + 1, vocabulary] the model's.
    """
    count = len(proposed)
    places = torch.arange(count, device=proposed.device)
    ratio = p[places, proposed] / q[places, proposed]
    fits = ratio >= 1
    if not bool(fits.all()):
        fits |= torch.rand(count, device=ratio.device) < ratio
    right = int(fits.long().cumprod(0).sum())
    rest = p[right] if right == count else (p[right] - q[right]).clamp(min=0)
    # by rounding, nothing may be left where both are the same
    rest = rest / rest.sum() if bool(rest.sum() > 0) else p[right]
    return torch.cat([proposed[:right], draw(rest[None])])
