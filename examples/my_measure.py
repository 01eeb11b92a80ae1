"""A measure of one's own: `reroll evaluate OUT --load FILE --measures confidence`."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from reroll.bounds import WINDOW
from reroll.evaluate.measure import Bench, Measure, NotApplicable
from reroll.evaluate.measures.perplexity import Text
from reroll.evaluate.runner import Runner
from reroll.rewrite.pipeline.options import option


class Confidence(Measure):
    """How sure a model is of the next token, and how often it is right."""

    name = "confidence"
    full: ClassVar[Mapping[str, Any]] = {"context": 1024}

    context: int = option(128, within=WINDOW, help="tokens of the text")

    def run(self, bench: Bench) -> dict[str, Any]:
        return {side: self._of(bench, runner) for side, runner in bench.sides.items()}

    def headline(self, result: Mapping[str, Any]) -> dict[str, float | int | None]:
        return {
            "probability of the likeliest token": result["confidence"],
            "how often it is right": result["accuracy"],
        }

    def _of(self, bench: Bench, runner: Runner) -> dict[str, Any]:
        runner.need_generation()
        text = Text(runner, bench.text, self.context)
        ids = torch.tensor([runner.prefix + text.ids[: self.context]])
        if runner.limit is not None and ids.shape[1] > runner.limit:
            raise NotApplicable(f"{runner.name} takes {runner.limit} tokens")
        sure, right, count = 0.0, 0, ids.shape[1] - 1
        for positions, logits in runner.logits(ids, range(count)):
            highest, token = logits[0].float().softmax(-1).max(-1)
            sure += highest.sum().item()
            right += int((token.cpu() == ids[0, positions + 1]).sum())
        return {"tokens": count, "confidence": sure / count, "accuracy": right / count}
