"""Decode speed with a state of constant size, beside the original with its growing cache.

One process, one token of each model in turn. The original's cache is filled with random keys and
values; the others read a prompt that fills their state, which then stands at the context's end.
"Over the first" is each model's time over its own at the first context, these in turns as well.

    python -m benchmarks.linearize_speed [--model DIR] [--contexts 1024,8192,32768] [--json FILE]
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache

import reroll
from benchmarks.harness import MODEL, Table, in_turns, medians, original, parse_options
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


def main() -> None:
    """One row for each context and model."""
    options = parse_options(__doc__, model=MODEL, contexts=(1024, 8192, 32768), steps=16)
    program = reroll.capture(options.model, dtype="float32")
    programs = {n: reroll.run_passes(program, t, measure=False) for n, t in PIPELINES.items()}
    models = {name: each.to_module() for name, each in programs.items()}
    models = {"original": original(options.model)} | models
    columns = {"context": "{:,}", "model": "{}", "tokens/s": "{:.2f}", "of the original": "{:.2f}"}
    table = Table(options, columns | {"state, MB": "{:.1f}", "over the first": "{:.3f}"})
    token = torch.tensor([[100]])

    def step(name: str, context: int) -> Callable[[], Any]:
        made = filled if name == "original" else after_prompt
        cache = made(models[name], context)
        return partial(models[name], token, past_key_values=cache, use_cache=True)

    with torch.inference_mode():
        drift: dict[str, dict[str, float]] = {}
        for name in PIPELINES:
            sides = {str(context): step(name, context) for context in options.contexts}
            took = medians(in_turns(sides, 2 * options.steps, warm=3))
            drift[name] = {context: s / next(iter(took.values())) for context, s in took.items()}
        for context in options.contexts:
            sides = {name: step(name, context) for name in models}
            seconds = medians(in_turns(sides, options.steps, warm=3))
            for name, each in seconds.items():
                row = {"context": context, "model": name, "tokens/s": 1 / each}
                row["of the original"] = seconds["original"] / each
                row["state, MB"] = state_bytes(programs.get(name, program), context) / 1e6
                row["over the first"] = drift.get(name, {}).get(str(context))
                table.add(row)


if __name__ == "__main__":
    main()
