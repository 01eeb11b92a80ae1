"""Compare a model's predictions with its original's on text, token by token.

The results are KL(original || model) in nats, and the share of positions at which both have the
same most likely token. `top1_in_top5` is how often the original's most likely token is among the
model's five most likely.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from reroll.bounds import COUNT_OR_NONE, WINDOW
from reroll.evaluate.measure import Bench, Measure, NotApplicable, within
from reroll.evaluate.measures.perplexity import Text
from reroll.rewrite.analysis.distance import Distance
from reroll.rewrite.pipeline.options import option


class Agreement(Measure):
    """KL divergence from the original, and agreement with its likeliest tokens."""

    name = "agreement"
    full: ClassVar[Mapping[str, Any]] = {"contexts": [512, 2048], "tokens": 32768}

    contexts: list[int] = option([512], within=WINDOW, help="tokens in each window of the text")
    tokens: int = option(
        2048, within=COUNT_OR_NONE, help="no more tokens of the text than this; 0 for all"
    )

    def run(self, bench: Bench) -> dict[str, Any]:
        original = bench.need_original()
        original.need_generation()
        bench.model.need_generation()
        text = Text(original, bench.text, self.tokens)
        contexts = within(self.contexts, bench.model, len(text.ids))
        if not contexts:
            raise NotApplicable(f"no context fits: the text has {len(text.ids)} tokens")
        return {"model": {"contexts": [self._at(bench, text, c) for c in contexts]}}

    def headline(self, result: Mapping[str, Any]) -> dict[str, float | int | None]:
        rows: dict[str, float | int | None] = {}
        for at in result["contexts"]:
            rows[f"KL from the original at {at['context']:,} (nats)"] = at["kl"]
            rows[f"top-1 agreement at {at['context']:,}"] = at["top1_agreement"]
        return rows

    def _at(self, bench: Bench, text: Text, context: int) -> dict[str, Any]:
        original, model = bench.need_original(), bench.model
        lead = original.prefix
        room = context - len(lead)
        starts = range(0, len(text.ids) - room + 1, room)
        distance = Distance(logits=True)
        among = 0
        for number, start in enumerate(starts):
            bench.progress(number, len(starts), f"context {context}")
            ids = torch.tensor([lead + text.ids[start : start + room]])
            pieces = zip(original.logits(ids), model.logits(ids), strict=True)
            for (_, expected), (_, actual) in pieces:
                if expected.shape != actual.shape:
                    raise NotApplicable(
                        f"the models have different vocabularies: {expected.shape[-1]} and "
                        f"{actual.shape[-1]}"
                    )
                distance.add(expected[0], actual[0])
                five = actual[0].topk(min(5, actual.shape[-1])).indices
                among += int((five == expected[0].argmax(-1, keepdim=True)).any(-1).sum())
        return {
            "context": context,
            "kl": distance.kl,
            "top1_agreement": distance.top1_agreement,
            "top1_in_top5": among / distance.positions,
            "tokens": distance.positions,
        }
