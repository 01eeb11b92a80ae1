"""Copying: measure how well a passage is predicted when it is repeated.

The input is a passage of `length` tokens of the text, then the same passage again (after "repeat
after me", Jelassi et al., 2024, arXiv 2402.01032). Every token of the copy has occurred `length`
tokens before. A model with recall predicts nearly all of them; to one without, the copy is text
like any other. `recall` asks one question for each context; this scores every token, so its results
vary by a few per cent only, and show recall earlier.

`again` is the share of the copy's tokens that are predicted as most likely, `first` that of the
passage's. `loss_again` and `loss_first` are the mean negative log-likelihoods in nats. The first
`SETTLING` tokens of both are not counted, because a model must first notice the repetition.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from reroll.bounds import COUNT, LARGEST, Range
from reroll.evaluate.measure import Bench, Measure, NotApplicable
from reroll.evaluate.measures.perplexity import Text
from reroll.evaluate.runner import Runner
from reroll.rewrite.pipeline.options import option

# tokens at the start of the passage and of its copy that are not counted
SETTLING = 16


class Copying(Measure):
    """Copying: the share of a repeated passage that is predicted, by its length."""

    name = "copying"
    full: ClassVar[Mapping[str, Any]] = {"lengths": [64, 256, 1024], "passages": 16}

    lengths: list[int] = option(
        [64, 256],
        within=Range(least=SETTLING + 1, most=LARGEST),
        help="tokens of the passage: the distance to copy over",
    )
    passages: int = option(4, within=COUNT, help="passages of each length")

    def run(self, bench: Bench) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for side, runner in bench.sides.items():
            runner.need_generation()
            fitting = [n for n in self.lengths if not runner.limit or 2 * n < runner.limit]
            if not fitting:
                raise NotApplicable(f"no length fits twice into {runner.limit} tokens")
            result[side] = {"lengths": []}
            for length in fitting:
                bench.progress(0, 0, f"{side}, copying over {length} tokens")
                result[side]["lengths"].append(self._at(bench, runner, length))
        return result

    def headline(self, result: Mapping[str, Any]) -> dict[str, float | int | None]:
        return {f"copied over {at['length']:,} tokens": at["again"] for at in result["lengths"]}

    def _at(self, bench: Bench, runner: Runner, length: int) -> dict[str, Any]:
        text = Text(runner, bench.text, 2 * length * self.passages)
        starts = range(0, len(text.ids) - length + 1, 2 * length)
        if not starts:
            raise NotApplicable(f"the text has no {length} tokens")
        totals = torch.zeros(4)
        for start in starts:
            passage = text.ids[start : start + length]
            ids = torch.tensor([runner.prefix + passage + passage])
            totals += _twice(runner, ids, length)
        first, again, loss_first, loss_again = (totals / len(starts)).tolist()
        return {
            "length": length,
            "passages": len(starts),
            "first": first,
            "again": again,
            "loss_first": loss_first,
            "loss_again": loss_again,
        }


def _twice(runner: Runner, ids: Tensor, length: int) -> Tensor:
    """Compute the means of correct predictions and losses, of passage and copy: [4]."""
    right, loss = torch.zeros(ids.shape[1]), torch.zeros(ids.shape[1])
    for positions, logits in runner.logits(ids, range(ids.shape[1] - 1)):
        targets = ids[0, positions + 1].to(logits.device)
        log = logits[0].float().log_softmax(-1)
        right[positions + 1] = (log.argmax(-1) == targets).float().cpu()
        loss[positions + 1] = -log.gather(1, targets[:, None])[:, 0].cpu()
    lead = ids.shape[1] - 2 * length
    parts = [slice(at + SETTLING, at + length) for at in (lead, lead + length)]
    return torch.stack([values[part].mean() for values in (right, loss) for part in parts])
