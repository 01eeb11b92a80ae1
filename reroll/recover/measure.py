"""What a run measures on rows that it never trains on."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from reroll.evaluate.distance import Distance
from reroll.recover.data import Rows
from reroll.recover.stage import Batch, arguments


def held_out(module: Any, teacher: Any | None, rows: Rows) -> dict[str, float]:
    """Perplexity of a lowered model; with an original its perplexity, and the distance from it.

    The KL divergence KL(original || model) is in nats per token, the agreement is the share of
    tokens at which both find the same token likeliest.
    """
    training = module.training
    module.eval()
    device = next(module.parameters()).device
    distance = Distance(logits=True)
    with torch.no_grad():
        for row, mask in zip(rows.ids, rows.mask, strict=True):
            ids = row[None, : int(mask.sum())].to(device)
            batch = Batch(ids, torch.ones_like(ids))
            ours: Tensor = module(**arguments(batch)).logits[0]
            theirs = ours if teacher is None else teacher(**arguments(batch)).logits[0]
            following = torch.cat((ids[0, 1:], ids.new_full((1,), -100)))
            distance.add(theirs, ours, following)
    module.train(training)
    perplexity, original = (distance.perplexity(side) or math.nan for side in (1, 0))
    found = {"perplexity": perplexity}
    if teacher is not None:
        found["original_perplexity"] = original
        found |= {"kl": distance.kl, "top1_agreement": distance.top1_agreement}
    return found
