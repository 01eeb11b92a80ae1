"""Distil: train the student's distribution of the next token towards the original's."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from reroll.bounds import COUNT, NOT_NEGATIVE, POSITIVE
from reroll.recover.hooks import record_trips
from reroll.recover.losses import cross_entropy, mean_over_pieces, unpadded
from reroll.recover.stage import Batch, Loss, Models, Stage
from reroll.recover.stages.align import relative_error
from reroll.rewrite.pipeline.options import option


class Distil(Stage):
    """Minimise the KL divergence from the original's distribution of the next token.

        loss = T^2 KL(p_T || q_T) + ce * cross-entropy + hidden * error of the last hidden state

    with p the original's and q the student's softmax(logits / T) (Hinton et al., 2015, arXiv
    1503.02531), or KL(q || p) with `direction=reverse`. With `top_k`, only the original's k most
    likely tokens are compared one by one, and all others as one.
    """

    name = "distil"

    temperature: float = option(1.0, within=POSITIVE, help="divides the logits")
    direction: Literal["forward", "reverse"] = option("forward", help="which way the KL goes")
    top_k: int | None = option(
        None, within=COUNT, help="compare the original's likeliest tokens only"
    )
    ce: float = option(0.0, within=NOT_NEGATIVE, help="weight of the cross-entropy of the text")
    hidden: float = option(
        0.0, within=NOT_NEGATIVE, help="weight of the relative error of the last hidden state"
    )

    def loss(self, batch: Batch, models: Models) -> Loss:
        assert models.teacher is not None
        ends = [m.trip_modules()[-1] for m in (models.teacher, models.module)]
        with record_trips(ends[:1]) as teacher_trips:
            expected = models.ask(batch)
        with record_trips(ends[1:]) as student_trips:
            logits = models.run(batch)
        kl = self.divergence(unpadded(logits, batch.mask), unpadded(expected, batch.mask))
        value, parts = kl, {"kl": kl.item()}
        if self.ce:
            ce = cross_entropy(logits, batch.labels)
            value, parts["ce"] = value + self.ce * ce, ce.item()
        if self.hidden:
            (source, target), (_, output) = teacher_trips[0], student_trips[0]
            error = relative_error(output, target, source, batch.mask.float())
            value, parts["hidden"] = value + self.hidden * error, error.item()
        return Loss(value, parts)

    def divergence(self, logits: Tensor, expected: Tensor) -> Tensor:
        """Compute the mean divergence over positions; both are [positions, vocabulary]."""
        return mean_over_pieces(logits, self._piece, expected)

    def _piece(self, student: Tensor, teacher: Tensor) -> Tensor:
        q, p = student.float(), teacher.float()
        if self.temperature != 1:
            q, p = q / self.temperature, p / self.temperature
        q, p = q.log_softmax(-1), p.log_softmax(-1)
        if self.top_k is not None and self.top_k < p.shape[-1]:
            chosen = p.topk(self.top_k, -1).indices
            p, q = coarse(p, chosen), coarse(q, chosen)
        if self.direction == "reverse":
            p, q = q, p
        value = torch.dot(p.exp().flatten(), (p - q).flatten())
        return value * self.temperature**2


def coarse(log: Tensor, chosen: Tensor) -> Tensor:
    """Return log-probabilities of chosen tokens and of all others as one: [positions, k + 1]."""
    kept = log.gather(-1, chosen)
    rest = torch.log1p(-kept.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-6))
    return torch.cat((kept, rest), -1)
