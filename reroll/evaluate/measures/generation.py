"""Measure properties of greedy generation that perplexity does not show.

Each prompt is a passage of the text, continued greedily for `new` tokens; end-of-text tokens are
ignored.

- `agreement_tokens`: how many tokens equal the original's before the first that differs.
- `repetition`: 1 - distinct 4-grams / 4-grams within one continuation, averaged over them
  (seq-rep-4 of Welleck et al., 2019, arXiv 1908.04319).
- `distinct`: distinct n-grams / n-grams over all continuations together, n = 1, 2, 3 (Li et al.,
  2016, arXiv 1510.03055).

The text's own continuations are measured too, as `text`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from reroll.bounds import COUNT
from reroll.evaluate.measure import Bench, Measure, NotApplicable
from reroll.evaluate.measures.perplexity import Text
from reroll.rewrite.pipeline.options import option

# prompts in one batch
BATCH = 8


class Generation(Measure):
    """Greedy continuations: agreement with the original's, repetition, distinct n-grams."""

    name = "generation"
    full: ClassVar[Mapping[str, Any]] = {"prompts": 32, "prompt": 256, "new": 128}

    prompts: int = option(8, within=COUNT, help="how many prompts")
    prompt: int = option(
        128, within=COUNT, help="tokens of each prompt; more than a window to see its effect"
    )
    new: int = option(48, within=COUNT, help="tokens of each continuation")

    def run(self, bench: Bench) -> dict[str, Any]:
        bench.model.need_generation()
        text = Text(bench.model, bench.text, 0)
        prompt, new = self._fitting(bench)
        length = prompt + new
        count = min(self.prompts, len(text.ids) // length)
        if not count:
            raise NotApplicable(f"the text has {len(text.ids)} tokens, fewer than {length}")
        # the prompts are spread evenly over the text
        step = (len(text.ids) - length) // max(count - 1, 1)
        starts = [n * step for n in range(count)]
        prompts = torch.tensor([bench.model.prefix + text.ids[s : s + prompt] for s in starts])
        generated: dict[str, list[list[int]]] = {}
        for side, runner in bench.sides.items():
            generated[side] = []
            for number, part in enumerate(prompts.split(BATCH)):
                bench.progress(number * BATCH, count, f"{side}, continuing")
                generated[side] += runner.greedy(part, new).tolist()
        generated["text"] = [text.ids[s + prompt : s + length] for s in starts]
        result = {side: style(rows) for side, rows in generated.items()}
        if bench.original is not None:
            pairs = zip(generated["model"], generated["original"], strict=True)
            lengths = [agreement(a, b) for a, b in pairs]
            result["model"] |= {
                "agreement_tokens": sum(lengths) / count,
                "identical": sum(n == new for n in lengths) / count,
            }
        return {**result, "new": new, "prompts": count}

    def _fitting(self, bench: Bench) -> tuple[int, int]:
        """Return the tokens of a prompt and of its continuation, reduced to fit the models."""
        limits = [r.limit - len(r.prefix) for r in bench.sides.values() if r.limit]
        room = min(limits, default=self.prompt + self.new)
        if self.prompt + self.new <= room:
            return self.prompt, self.new
        prompt = max(room * self.prompt // (self.prompt + self.new), 1)
        return prompt, max(room - prompt, 1)

    def headline(self, result: Mapping[str, Any]) -> dict[str, float | int | None]:
        rows: dict[str, float | int | None] = {}
        if "agreement_tokens" in result:
            rows["tokens generated as the original does"] = result["agreement_tokens"]
        rows["repetition (4-grams)"] = result["repetition"]
        rows["distinct 2-grams"] = result["distinct"]["2"]
        return rows


def agreement(a: Sequence[int], b: Sequence[int]) -> int:
    """Count the tokens that two continuations have in common before the first that differs."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def style(rows: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Compute repetition and distinct n-grams of some continuations."""
    repeated = []
    for row in rows:
        grams = _grams(row, 4)
        repeated.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    distinct = {}
    for n in (1, 2, 3):
        grams = [g for row in rows for g in _grams(row, n)]
        distinct[str(n)] = len(set(grams)) / len(grams) if grams else 0.0
    return {"repetition": sum(repeated) / len(repeated), "distinct": distinct}


def _grams(row: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]
