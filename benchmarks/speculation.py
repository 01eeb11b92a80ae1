"""Decoding with drafts beside decoding without, and what verification costs."""

from __future__ import annotations

import copy
import statistics
from argparse import Namespace
from functools import cache, lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache

import reroll
from benchmarks.harness import TEXT, Row, Table, in_turns, medians
from reroll.evaluate.speculating import drafts_of
from reroll.runtime.speculation.decode import speculate
from reroll.runtime.speculation.drafts import read
from reroll.runtime.state.growing import take_back


@cache
def opened(name: str, dtype: str) -> tuple[Any, Any]:
    """A lowered model and its tokenizer."""
    model = reroll.capture(f"models/{name}", dtype=dtype).to_module()
    return model, AutoTokenizer.from_pretrained(f"models/{name}")


def passage(name: str, dtype: str, text: str, number: int, length: int) -> Tensor:
    """Tokens [1, length] of a file, other ones for each number."""
    characters = (TEXT / text).read_text(encoding="utf-8")[number * 10 * length :][: 10 * length]
    ids: Tensor = opened(name, dtype)[1](characters, return_tensors="pt").input_ids
    return ids[:, :length]


@lru_cache(maxsize=4)
def begun(name: str, dtype: str, text: str, number: int, length: int, piece: int) -> DynamicCache:
    """The cache of a passage, for all drafts."""
    return filled(opened(name, dtype)[0], passage(name, dtype, text, number, length), piece)


def filled(model: Any, ids: Tensor, piece: int) -> DynamicCache:
    """A cache that has read all tokens but the last."""
    made = DynamicCache(config=model.config)
    with torch.no_grad():
        for start in range(0, ids.shape[1] - 1, piece):
            part = ids[:, start : min(start + piece, ids.shape[1] - 1)]
            read(model, part, made, start, keep=1)
    return made


def compare(table: Table, options: Namespace) -> None:
    """Decode each passage with each draft, and without one before and after."""
    for case in table.missing():
        rows = [one(case, options, number) for number in range(options.passages)]
        found = {k: statistics.median(row[k] for row in rows) for k in rows[0]}
        parted = sum(row["parted"] for row in rows)
        table.add(case | found | {"parted": parted, "gap": max(row["gap"] for row in rows)})


def one(case: Row, options: Namespace, number: int) -> Row:
    """One passage: plain, with the draft, plain."""
    name, dtype, context = case["model"], case["dtype"], case["context"]
    model, ids = opened(name, dtype)[0], passage(name, dtype, options.text, number, context)
    start = begun(name, dtype, options.text, number, context, options.piece)
    drafts = drafts_of(model, case["draft"])
    runs = [
        speculate(model, ids, each, max_new_tokens=options.tokens, cache=copy.deepcopy(start))
        for each in ([], drafts, [])
    ]
    (plain, before), (tokens, report), (_, after) = runs
    rate = options.tokens / statistics.mean([before.seconds, after.seconds])
    proposed, accepted = (sum(x) for x in zip(*report.drafts.values(), strict=True))
    first = int((plain == tokens).long().cumprod(1).sum())
    gap = 0.0
    if first < plain.shape[1]:
        with torch.no_grad():
            best = model(plain[:, :first], logits_to_keep=1).logits[0, -1].float().topk(2).values
        gap = float((best[0] - best[1]) / best[0].abs())
    return {
        "plain, tokens/s": rate,
        "ratio": options.tokens / report.seconds / rate,
        "tokens a step": report.tokens / report.steps,
        "accepted": accepted / max(proposed, 1),
        "parted": int(first < plain.shape[1]),
        "gap": gap,
    }


def verification(table: Table, options: Namespace) -> None:
    """Time the model on k tokens behind a context, over one token."""
    for case in table.missing():
        model = opened(case["model"], case["dtype"])[0]
        ids = torch.randint(model.config.vocab_size, (1, case["context"]))
        made = filled(model, ids, options.piece)

        counts = [1, *map(int, options.counts)]
        sides = {str(k): partial(step, model, ids[:, :k], made) for k in counts}
        times = medians(in_turns(sides, options.rounds))
        ratios = {f"k = {k}": times[str(k)] / times["1"] for k in counts[1:]}
        table.add(case | {"one token, ms": 1e3 * times["1"]} | ratios)


def step(model: Any, ids: Tensor, made: DynamicCache) -> None:
    """Read some tokens behind a cache, and take them back."""
    with torch.no_grad():
        read(model, ids, made, int(made.get_seq_length()))
    take_back(made, ids.shape[1])
