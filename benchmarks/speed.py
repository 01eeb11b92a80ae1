"""Prefill and decode speed of a rolled, untied model beside the original under transformers.

Both run in one process, in turns, with the same threads: medians of many steps, and their ratios.

    python -m benchmarks.speed [--model DIR] [--contexts 128,1024,4096] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import reroll

PREFILLS = {128: 15, 1024: 7, 4096: 3}
DECODES, WARM = 16, 3


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that a call takes, and what it returns."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def measure(models: dict[str, Any], context: int, vocabulary: int) -> dict[str, Any]:
    """Median seconds of prefill and of one decoded token for each model, and the ratios."""
    ids = torch.randint(0, vocabulary, (1, context), generator=torch.Generator().manual_seed(0))
    prefill: dict[str, list[float]] = {name: [] for name in models}
    decode: dict[str, list[float]] = {name: [] for name in models}
    for round_ in range(PREFILLS.get(context, 3)):
        names = list(models) if round_ % 2 else list(models)[::-1]
        caches = {}
        for name in names:
            seconds, out = timed(partial(models[name], ids, use_cache=True, logits_to_keep=1))
            prefill[name].append(seconds)
            caches[name] = out.past_key_values
        for step in range(WARM + DECODES):
            # token by token in turns, so that what else the machine does hits both alike
            for name in names if step % 2 else names[::-1]:
                seconds, _ = timed(
                    partial(models[name], ids[:, :1], past_key_values=caches[name], use_cache=True)
                )
                if step >= WARM:
                    decode[name].append(seconds)
    row: dict[str, Any] = {"context": context}
    for what, times, tokens in (("prefill", prefill, context), ("decode", decode, 1)):
        medians = {name: statistics.median(seconds) for name, seconds in times.items()}
        row[what] = {f"{name}_tokens_per_second": tokens / s for name, s in medians.items()}
        row[what]["speedup"] = medians["transformers"] / medians["reroll"]
    return row


def main() -> None:
    """Run the comparison and print one line per context."""
    parser = argparse.ArgumentParser(description="prefill and decode speed beside transformers")
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--contexts", default="128,1024,4096")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--attention", default="sdpa", help="transformers' implementation")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    original = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=torch.float32, attn_implementation=options.attention
    ).eval()
    start = time.perf_counter()
    program = reroll.capture(options.model, dtype="float32")
    captured = time.perf_counter() - start
    models = {"transformers": original, "reroll": program.to_module().eval()}
    rows: dict[str, Any] = {"threads": options.threads, "capture_seconds": captured, "rows": []}
    print(f"captured, raised and rolled in {captured:.1f} s; {options.threads} threads, fp32")
    with torch.inference_mode():
        for context in map(int, options.contexts.split(",")):
            row = measure(models, context, original.config.vocab_size)
            rows["rows"].append(row)
            for what in ("prefill", "decode"):
                found = row[what]
                print(
                    f"context {context:5d} {what:8s}"
                    f"  transformers {found['transformers_tokens_per_second']:8.1f} tokens/s"
                    f"  reroll {found['reroll_tokens_per_second']:8.1f}"
                    f"  ratio {found['speedup']:.3f}",
                    flush=True,
                )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
