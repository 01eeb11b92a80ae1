"""Distances between two outputs, accumulated in chunks so that memory stays bounded."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# elements of one chunk: 64 MB in fp32
_PIECE = 2**24


class Distance:
    """Accumulated distance between outputs `a` and `b` over any number of positions.

    With `logits`, the outputs are logits. Then the KL divergence KL(a || b) in nats is accumulated
    too, and the share of positions whose largest logit is the same.
    """

    def __init__(self, logits: bool) -> None:
        self.logits = logits
        self.positions = 0
        self.largest = 0.0
        self._difference = 0.0
        self._reference = 0.0
        self._kl = 0.0
        self._agreements = 0
        self._losses = [0.0, 0.0]
        self._predicted = 0

    def add(self, a: Tensor, b: Tensor, targets: Tensor | None = None) -> None:
        """Add the outputs of some positions, [positions, width].

        `targets` [positions] are the next tokens, -100 where unknown.
        """
        step = max(_PIECE // max(a.shape[-1], 1), 1)
        for start in range(0, a.shape[0], step):
            piece = slice(start, start + step)
            self._add(a[piece], b[piece], None if targets is None else targets[piece])

    def _add(self, a: Tensor, b: Tensor, targets: Tensor | None) -> None:
        wide = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
        a, b = a.to(wide), b.to(wide)
        # the same infinity on both sides, where a model rules a token out, is no difference
        difference = torch.where(a == b, 0.0, a - b)
        self.positions += a.shape[0]
        self.largest = _larger(self.largest, difference.abs().max().item())
        self._difference += difference.square().sum(dtype=torch.float64).item()
        finite = torch.where(a.isfinite(), a, 0.0)
        self._reference += finite.square().sum(dtype=torch.float64).item()
        if not self.logits:
            return
        self._agreements += int((a.argmax(-1) == b.argmax(-1)).sum())
        a, b = a.log_softmax(-1), b.log_softmax(-1)
        likelihood = a.exp()
        ratio = torch.where(likelihood == 0, 0.0, a - b)
        self._kl += (likelihood * ratio).sum(dtype=torch.float64).item()
        if targets is None:
            return
        known = targets >= 0
        self._predicted += int(known.sum())
        for side, log in enumerate((a, b)):
            chosen = log[known].gather(1, targets[known][:, None])
            self._losses[side] -= chosen.sum(dtype=torch.float64).item()

    @property
    def relative_rms_error(self) -> float:
        """Root mean square of the difference divided by that of `a`."""
        if not self._reference:
            return math.inf if self._difference else 0.0
        return math.sqrt(self._difference / self._reference)

    @property
    def kl(self) -> float:
        """Mean KL divergence in nats, clamped at 0 against rounding."""
        mean = self._kl / self.positions
        return 0.0 if mean < 0 else mean

    @property
    def top1_agreement(self) -> float:
        """Share of positions at which both have the same largest logit."""
        return self._agreements / self.positions

    def perplexity(self, side: int) -> float | None:
        """Return the perplexity of `a` (0) or `b` (1); None if no target was known."""
        if not self._predicted:
            return None
        mean = self._losses[side] / self._predicted
        # a broken model's perplexity may not fit into a float
        return math.exp(mean) if mean < 700 else math.inf


def divergence(a: Tensor, b: Tensor) -> float:
    """Compute the mean KL(a || b) in nats of logits [..., vocabulary]."""
    distance = Distance(logits=True)
    distance.add(a.flatten(0, -2), b.flatten(0, -2))
    return distance.kl


def _larger(x: float, y: float) -> float:
    """Return the maximum, where NaN is larger than every number."""
    return y if math.isnan(y) or (y > x and not math.isnan(x)) else x
