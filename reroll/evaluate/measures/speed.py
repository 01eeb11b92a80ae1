"""Measure tokens per second in prefill and decode, and bytes of state, over the context.

Prefill is one forward over the whole context that fills the cache. Decode is token by token after
it. Both sides alternate in every round, and results are medians over the rounds, so that a busy
machine affects ratios less than times. Batch size 1. The state of one sequence is computed from the
program.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from reroll.bounds import COUNT
from reroll.evaluate.measure import Bench, Measure, NotApplicable, within
from reroll.evaluate.runner import Runner
from reroll.rewrite.pipeline.options import option


class Speed(Measure):
    """Prefill and decode in tokens per second, and bytes of state, over the context."""

    name = "speed"
    full: ClassVar[Mapping[str, Any]] = {
        "contexts": [128, 512, 1024, 2048, 4096],
        "rounds": 5,
        "decode": 16,
    }

    contexts: list[int] = option(
        [128, 1024], within=COUNT, help="tokens before the first that is generated"
    )
    decode: int = option(8, within=COUNT, help="tokens generated in each round")
    rounds: int = option(3, within=COUNT, help="rounds, in which the models take turns")

    def run(self, bench: Bench) -> dict[str, Any]:
        bench.model.need_generation()
        contexts = within(self.contexts, bench.model, behind=self.decode)
        if not contexts:
            raise NotApplicable("no context fits into the model's")
        result: dict[str, Any] = {"threads": torch.get_num_threads(), "rounds": self.rounds}
        tables: dict[str, list[dict[str, Any]]] = {side: [] for side in bench.sides}
        for context in contexts:
            for side, times in self._at(bench, context).items():
                prefill, decode = (statistics.median(t) for t in zip(*times, strict=True))
                tables[side].append(
                    {
                        "context": context,
                        "prefill_tokens_per_second": context / prefill,
                        "decode_tokens_per_second": self.decode / decode,
                        "state_bytes": bench.sides[side].subject.state_bytes(context),
                    }
                )
        for side, table in tables.items():
            result[side] = {"contexts": table}
        if bench.original is not None:
            pairs = zip(tables["model"], tables["original"], strict=True)
            result["ratio"] = {"contexts": [_ratio(a, b) for a, b in pairs]}
        return result

    def headline(self, result: Mapping[str, Any]) -> dict[str, float | int | None]:
        rows: dict[str, float | int | None] = {}
        for at in result["contexts"]:
            rows[f"prefill, {at['context']:,} tokens (tokens/s)"] = at["prefill_tokens_per_second"]
            rows[f"decode behind {at['context']:,} (tokens/s)"] = at["decode_tokens_per_second"]
            rows[f"state at {at['context']:,} (bytes)"] = at["state_bytes"]
        return rows

    def _at(self, bench: Bench, context: int) -> dict[str, list[tuple[float, float]]]:
        """Measure seconds of prefill and decode by side and round, after a warm-up round."""
        random = bench.random("speed", context)
        top = min(r.vocabulary for r in bench.sides.values())
        ids = torch.tensor([[random.randrange(top) for _ in range(context)]])
        times: dict[str, list[tuple[float, float]]] = {side: [] for side in bench.sides}
        for number in range(self.rounds + 1):
            sides = list(bench.sides.items())
            for side, runner in sides if number % 2 else sides[::-1]:
                bench.progress(number, self.rounds + 1, f"context {context}, {side}")
                seconds = _time(runner, ids, self.decode)
                if number:
                    times[side].append(seconds)
        return times


def _time(runner: Runner, ids: Tensor, count: int) -> tuple[float, float]:
    """Measure the seconds of one prefill, and of decoding `count` tokens after it."""
    _wait(runner.device)
    start = time.perf_counter()
    outputs = runner.forward(ids, None, 1, use_cache=True)
    token = outputs["logits"][:, -1].argmax(-1, keepdim=True)
    _wait(runner.device)
    filled = time.perf_counter()
    step = ids.to(runner.device)
    for _ in range(count):
        cache = outputs.get("past_key_values")
        step = token if cache is not None else torch.cat([step, token], dim=1)
        outputs = runner.forward(step, cache, 1, use_cache=True)
        token = outputs["logits"][:, -1].argmax(-1, keepdim=True)
    _wait(runner.device)
    return filled - start, time.perf_counter() - filled


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _ratio(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """Divide the model's numbers by the original's."""
    return {
        "context": a["context"],
        **{k: a[k] / b[k] if a[k] is not None and b[k] else None for k in a if k != "context"},
    }
