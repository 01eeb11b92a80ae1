"""Measure a model during a run, on held-out rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from reroll.recover.data import RowSource
from reroll.recover.stage import Batch, arguments, batch_of
from reroll.rewrite.analysis.distance import Distance
from reroll.rewrite.analysis.hidden_inputs import cosine


def held_out(module: Any, teacher: Any | None, rows: RowSource) -> dict[str, float]:
    """Measure the quality of a lowered model and its distance from the original.

    For a model that predicts the next token it is the perplexity. With an original there are also
    the original's perplexity and KL(original || model) in nats per token. `top1_agreement` is the
    share of positions at which both have the same most likely token. For any other model, the
    measurements are the mean cosine between its first output and the original's, over positions,
    and the relative RMS error.
    """
    training = module.training
    module.eval()
    measure = _predictions if module.can_generate() else _features
    with torch.no_grad():
        metrics = measure(module, teacher, rows)
    module.train(training)
    return metrics


def _one_by_one(module: Any, rows: RowSource) -> Iterator[Batch]:
    return (batch_of(module, rows.pick([number])) for number in range(len(rows)))


def _predictions(module: Any, teacher: Any | None, rows: RowSource) -> dict[str, float]:
    distance = Distance(logits=True)
    for batch in _one_by_one(module, rows):
        student_logits: Tensor = module(**arguments(batch)).logits[0]
        teacher_logits = (
            student_logits if teacher is None else teacher(**arguments(batch)).logits[0]
        )
        ids = batch.data[0]
        following = torch.cat((ids[1:], ids.new_full((1,), -100)))
        distance.add(teacher_logits, student_logits, following)
    perplexity, original = (distance.perplexity(side) or math.nan for side in (1, 0))
    metrics = {"perplexity": perplexity}
    if teacher is not None:
        metrics["original_perplexity"] = original
        metrics |= {"kl": distance.kl, "top1_agreement": distance.top1_agreement}
    return metrics


def _features(module: Any, teacher: Any | None, rows: RowSource) -> dict[str, float]:
    if teacher is None:
        return {}
    distance, cosines = Distance(logits=False), []
    for batch in _one_by_one(module, rows):
        student_states, teacher_states = (
            m(**arguments(batch))[0].flatten(0, -2) for m in (module, teacher)
        )
        distance.add(teacher_states, student_states)
        cosines.append(cosine(teacher_states.float(), student_states.float()))
    return {"cosine": sum(cosines) / len(cosines), "relative_error": distance.relative_rms_error}
