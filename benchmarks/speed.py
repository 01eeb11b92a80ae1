"""Prefill and decode speed of a rolled, untied model beside the original under transformers.

Both run in one process, in turns, token by token: medians of many steps, and their ratios.

    python -m benchmarks.speed [--model DIR] [--contexts 128,1024,4096] [--json FILE]
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

import reroll
from benchmarks.harness import MODEL, Row, Table, in_turns, medians, original, parse_options

PREFILLS = {128: 15, 1024: 7, 4096: 3}
DECODES = 16


def measure(models: dict[str, Any], context: int, vocabulary: int) -> Row:
    """Tokens per second of prefill and decoding, and reroll's over transformers'."""
    ids = torch.randint(0, vocabulary, (1, context), generator=torch.Generator().manual_seed(0))
    caches: dict[str, Any] = {}

    def prefill(name: str) -> None:
        out = models[name](ids, use_cache=True, logits_to_keep=1)
        caches[name] = out.past_key_values

    def decode(name: str) -> None:
        models[name](ids[:, :1], past_key_values=caches[name], use_cache=True)

    row: Row = {}
    rounds = PREFILLS.get(context, 3)
    for phase, run, count, tokens in (
        ("prefill", prefill, rounds, context),
        ("decode", decode, DECODES * rounds, 1),
    ):
        sides = {name: partial(run, name) for name in models}
        seconds = medians(in_turns(sides, count, warm=1 if phase == "prefill" else 3))
        row |= {f"{phase}, {name}, tokens/s": tokens / s for name, s in seconds.items()}
        row[f"{phase}, ratio"] = seconds["transformers"] / seconds["reroll"]
    return row


def main() -> None:
    """One row for each context."""
    options = parse_options(
        __doc__, model=MODEL, contexts=(128, 1024, 4096), threads=2, attention="sdpa"
    )
    peer = original(options.model, attn_implementation=options.attention)
    models = {
        "transformers": peer,
        "reroll": reroll.capture(options.model, dtype="float32").to_module().eval(),
    }
    columns = {"context": "{:,}"}
    for phase in ("prefill", "decode"):
        columns |= {f"{phase}, {name}, tokens/s": "{:.1f}" for name in models}
        columns[f"{phase}, ratio"] = "{:.3f}"
    table = Table(options, columns)
    with torch.inference_mode():
        for case in table.missing({"context": context} for context in options.contexts):
            table.add(case | measure(models, case["context"], peer.config.vocab_size))


if __name__ == "__main__":
    main()
