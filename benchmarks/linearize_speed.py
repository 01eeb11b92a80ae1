"""Decode speed with a state of constant size, beside the original with its growing cache.

One process, one token of each model in turn, so that what else the machine does hits all alike. The
original's cache is filled with random keys and values; the others read a prompt that fills their
state, which is then told that it has seen as many tokens as the context has.

    python -m benchmarks.linearize_speed [--model DIR] [--contexts 1024,8192,32768] [--threads 1]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

import reroll
from reroll.rewrite.analysis.costs import state_bytes

PIPELINES = {
    "window": "window(size=64, sinks=4)",
    "linear": "linearize(mixer=retention, feature_map=softmax, gain=0.1)",
    "slots": (
        "linearize(mixer=gsa, mixer_options={slots: 256, floor: -5.0}, gates=clustered, "
        "combine=joint)"
    ),
    "linear alone": "linearize(mixer=retention, feature_map=softmax, window=0)",
}
PROMPT = 160


def filled(model: Any, context: int) -> DynamicCache:
    """The original's cache with `context` random tokens in it."""
    config, cache = model.config, DynamicCache(config=model.config)
    size = (1, config.num_key_value_heads, context, config.head_dim)
    for layer in range(config.num_hidden_layers):
        cache.update(torch.randn(size), torch.randn(size), layer)
    return cache


def after_prompt(model: Any, context: int) -> DynamicCache:
    """A full state of constant size that stands at position `context`."""
    cache = model(torch.arange(PROMPT)[None] + 100, use_cache=True).past_key_values
    for layer in cache.layers:
        layer.cumulative_length = context
    return cache


def measure(models: dict[str, Any], context: int, steps: int) -> dict[str, float]:
    """Median seconds of one decoded token for each model."""
    caches = {
        name: filled(model, context) if name == "original" else after_prompt(model, context)
        for name, model in models.items()
    }
    token = torch.tensor([[100]])
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for step in range(steps + 3):
        for name in list(models) if step % 2 else list(models)[::-1]:
            start = time.perf_counter()
            models[name](token, past_key_values=caches[name], use_cache=True)
            if step >= 3:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def drift(model: Any, contexts: list[int], steps: int) -> dict[int, float]:
    """Seconds of a token at each context over those at the first, the contexts in turn."""
    caches = {context: after_prompt(model, context) for context in contexts}
    token = torch.tensor([[100]])
    seconds: dict[int, list[float]] = {context: [] for context in contexts}
    for step in range(steps + 3):
        for context in contexts if step % 2 else contexts[::-1]:
            start = time.perf_counter()
            model(token, past_key_values=caches[context], use_cache=True)
            if step >= 3:
                seconds[context].append(time.perf_counter() - start)
    medians = {context: statistics.median(times) for context, times in seconds.items()}
    return {context: each / medians[contexts[0]] for context, each in medians.items()}


def main() -> None:
    """Print a line per context."""
    parser = argparse.ArgumentParser(description="decode speed of linearized models")
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--contexts", default="1024,8192,32768")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    program = reroll.capture(options.model, dtype="float32")
    programs = {n: reroll.run_passes(program, t, measure=False) for n, t in PIPELINES.items()}
    original = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    models = {"original": original, **{n: p.to_module() for n, p in programs.items()}}
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for context in map(int, options.contexts.split(",")):
            seconds = measure(models, context, options.steps)
            row: dict[str, Any] = {"context": context, "seconds": seconds}
            row["state"] = {n: state_bytes(p, context) for n, p in programs.items()}
            row["state"]["original"] = state_bytes(program, context)
            rows.append(row)
            found = "  ".join(
                f"{name} {1 / each:.2f} tokens/s ({seconds['original'] / each:.2f} x, "
                f"{row['state'][name] / 1e6:.1f} MB)"
                for name, each in seconds.items()
            )
            print(f"context {context:6d}  {found}", flush=True)
        contexts = [row["context"] for row in rows]
        for name in PIPELINES:
            ratios = drift(models[name], contexts, 2 * options.steps)
            rows.append({"name": name, "over the first": ratios})
            print(
                f"{name}: time of a token", {c: round(r, 3) for c, r in ratios.items()}, flush=True
            )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
