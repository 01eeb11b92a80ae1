"""What a run measures on rows that it never trains on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from reroll.recover.data import Source
from reroll.recover.stage import Batch, arguments, batch_of
from reroll.rewrite.analysis.distance import Distance
from reroll.rewrite.analysis.hidden_inputs import cosine


def held_out(module: Any, teacher: Any | None, rows: Source) -> dict[str, float]:
    """How good a lowered model is, and how far from its original.

    Of one that predicts the next token, the perplexity; with an original its perplexity, and the
    distance from it: KL(original || model) in nats per token, and the share of tokens at which both
    find the same token likeliest. Of any other, the mean cosine of its first output with the
    original's, over positions, and the relative RMS error.
    """
    training = module.training
    module.eval()
    measure = _predictions if module.can_generate() else _features
    with torch.no_grad():
        found = measure(module, teacher, rows)
    module.train(training)
    return found


def _one_by_one(module: Any, rows: Source) -> Iterator[Batch]:
    return (batch_of(module, rows.pick([number])) for number in range(len(rows)))


def _predictions(module: Any, teacher: Any | None, rows: Source) -> dict[str, float]:
    distance = Distance(logits=True)
    for batch in _one_by_one(module, rows):
        ours: Tensor = module(**arguments(batch)).logits[0]
        theirs = ours if teacher is None else teacher(**arguments(batch)).logits[0]
        ids = batch.data[0]
        following = torch.cat((ids[1:], ids.new_full((1,), -100)))
        distance.add(theirs, ours, following)
    perplexity, original = (distance.perplexity(side) or math.nan for side in (1, 0))
    found = {"perplexity": perplexity}
    if teacher is not None:
        found["original_perplexity"] = original
        found |= {"kl": distance.kl, "top1_agreement": distance.top1_agreement}
    return found


def _features(module: Any, teacher: Any | None, rows: Source) -> dict[str, float]:
    if teacher is None:
        return {}
    distance, cosines = Distance(logits=False), []
    for batch in _one_by_one(module, rows):
        ours, theirs = (m(**arguments(batch))[0].flatten(0, -2) for m in (module, teacher))
        distance.add(theirs, ours)
        cosines.append(cosine(theirs.float(), ours.float()))
    return {"cosine": sum(cosines) / len(cosines), "relative_error": distance.relative_rms_error}
