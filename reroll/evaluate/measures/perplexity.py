"""Perplexity, and bits per byte.

Perplexity is exp of the mean negative log-likelihood of the next token, over text cut into windows
of `context` tokens. `block` windows do not overlap. `sliding` ones start every `stride` tokens, and
only tokens that no earlier window counted are counted. So all but those of the first window have at
least context - stride tokens before them.

Bits per byte are the same likelihoods in bits, over the UTF-8 bytes of the counted tokens' text.
They compare models with different tokenizers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from reroll.bounds import COUNT_OR_NONE, WINDOW
from reroll.evaluate.measure import Bench, Measure, NotApplicable, within
from reroll.evaluate.runner import Runner
from reroll.rewrite.pipeline.options import option

# the most tokens of one batch
BATCH = 4096
# more characters per token are rare, so longer text is cut before it is tokenized
CHARACTERS = 16


class Perplexity(Measure):
    """Perplexity and bits per byte over the context, in blocks or sliding."""

    name = "perplexity"
    full: ClassVar[Mapping[str, Any]] = {"contexts": [128, 512, 2048, 8192], "tokens": 65536}

    contexts: list[int] = option(
        [128, 512, 2048],
        within=WINDOW,
        help="tokens in each window of the text",
    )
    tokens: int = option(
        4096, within=COUNT_OR_NONE, help="no more tokens of the text than this; 0 for all"
    )
    style: Literal["block", "sliding"] = option("block", help="whether windows overlap")
    stride: int = option(
        0, within=COUNT_OR_NONE, help="with sliding: tokens between windows; 0 for half the context"
    )

    def run(self, bench: Bench) -> dict[str, Any]:
        result: dict[str, Any] = {"style": self.style}
        for side, runner in bench.sides.items():
            runner.need_generation()
            text = Text(runner, bench.text, self.tokens)
            curve = []
            for number, context in enumerate(within(self.contexts, runner, len(text.ids))):
                bench.progress(number, len(self.contexts), f"{side}, context {context}")
                curve.append(self._at(runner, text, context))
            if not curve:
                raise NotApplicable(
                    f"no context fits: the text has {len(text.ids)} tokens, and the model takes "
                    f"{runner.limit or 'any number'}"
                )
            kept = [c["context"] for c in curve]
            result[side] = {
                "contexts": curve,
                "left_out": [c for c in self.contexts if c not in kept],
                "bytes_from": text.bytes_from,
            }
        return result

    def headline(self, result: Mapping[str, Any]) -> dict[str, float | int | None]:
        rows: dict[str, float | int | None] = {
            f"perplexity at {c['context']:,}": c["perplexity"] for c in result["contexts"]
        }
        rows["bits per byte, longest context"] = result["contexts"][-1]["bits_per_byte"]
        return rows

    def _at(self, runner: Runner, text: Text, context: int) -> dict[str, Any]:
        loss, count, size = 0.0, 0, 0
        for ids, first, starts in self._windows(runner, text, context):
            counted = range(first, ids.shape[1])
            loss += _loss(runner, ids, counted)
            count += len(counted) * len(ids)
            lead = len(runner.prefix)
            for start in starts:
                size += text.bytes(start + first - lead, start + ids.shape[1] - lead)
        mean = loss / count
        return {
            "context": context,
            "perplexity": math.exp(mean) if mean < 700 else math.inf,
            "bits_per_byte": loss / math.log(2) / size if size else None,
            "tokens": count,
            "bytes": size,
        }

    def _windows(
        self, runner: Runner, text: Text, context: int
    ) -> Iterator[tuple[Tensor, int, list[int]]]:
        """Yield rows of ids, the first counted position, and the rows' offsets in the text."""
        lead = runner.prefix
        room = context - len(lead)
        step = room if self.style == "block" else min(self.stride or max(room // 2, 1), room)
        starts = list(range(0, len(text.ids) - room + 1, step)) or [0]
        rows = max(BATCH // context, 1)
        # the first token has no context to predict it from, unless there is a special token
        fresh = max(len(lead), 1)
        if self.style == "block":
            groups = [(fresh, starts[i : i + rows]) for i in range(0, len(starts), rows)]
        else:
            later = starts[1:]
            groups = [(fresh, starts[:1])]
            groups += [
                (len(lead) + room - step, later[i : i + rows]) for i in range(0, len(later), rows)
            ]
        for first, chosen in groups:
            yield torch.tensor([lead + text.ids[s : s + room] for s in chosen]), first, chosen


@dataclass
class Text:
    """A text as token ids, with the number of bytes of each range of them."""

    ids: list[int]
    bytes_from: str

    def __init__(self, runner: Runner, text: str, most: int) -> None:
        if most:
            text = text[: CHARACTERS * most]
        fast = bool(getattr(runner.tokenizer, "is_fast", False))
        encoded = runner.tokenizer(
            text, add_special_tokens=False, verbose=False, return_offsets_mapping=fast
        )
        self.ids = [int(i) for i in encoded["input_ids"]]
        if len(self.ids) < 2:
            raise NotApplicable("the text has fewer than two tokens")
        # byte offsets of the characters, and of the end of each token
        if fast:
            self.bytes_from = "offsets"
            offsets = [0, *accumulate(len(c.encode()) for c in text)]
            ends = accumulate((end for _, end in encoded["offset_mapping"]), max)
            self._ends: list[int] = [0, *(offsets[end] for end in ends)]
        else:
            self.bytes_from = "average"
            rate = len(text.encode()) / len(self.ids)
            self._ends = [round(rate * n) for n in range(len(self.ids) + 1)]
        if most:
            self.ids = self.ids[:most]

    def bytes(self, start: int, end: int) -> int:
        """Count the bytes of the tokens from `start` up to `end`; shared bytes count once."""
        return self._ends[end] - self._ends[start]


def _loss(runner: Runner, ids: Tensor, counted: range) -> float:
    """Compute the negative log-likelihood, in nats, of the tokens at the `counted` positions."""
    total = 0.0
    for positions, logits in runner.logits(ids, [p - 1 for p in counted]):
        targets = ids[:, positions + 1].to(logits.device)  # [rows, positions]
        for row, target in zip(logits, targets, strict=True):
            log = row.float().log_softmax(-1)
            total -= log.gather(1, target[:, None]).sum(dtype=torch.float64).item()
    return total
