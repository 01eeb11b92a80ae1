"""Decoding with drafts beside decoding without, and what verification costs."""

from __future__ import annotations

import copy
import statistics
from argparse import Namespace
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache

import reroll
from benchmarks.harness import TEXT, Row, Table, in_turns, medians
from reroll.evaluate.speculating import drafts_of, twin
from reroll.runtime.speculation.decode import speculate
from reroll.runtime.speculation.reading import Reading, begin
from reroll.runtime.state.states import state_attributes


@lru_cache(maxsize=1)
def opened(name: str, dtype: str, context: int) -> tuple[Any, Any]:
    """A lowered model and its tokenizer.

    Behind more tokens than it has positions for, its rotary positions are scaled (YaRN), as users
    run it.
    """
    config = AutoConfig.from_pretrained(f"models/{name}")
    positions = config.max_position_embeddings
    if context > positions:
        factor = -(-context // positions)
        config.rope_parameters |= {
            "rope_type": "yarn",
            "factor": float(factor),
            "original_max_position_embeddings": positions,
        }
        config.max_position_embeddings = factor * positions
    model = AutoModelForCausalLM.from_pretrained(f"models/{name}", config=config, dtype=dtype)
    lowered = reroll.capture(model).to_module()
    return lowered, AutoTokenizer.from_pretrained(f"models/{name}")


def passage(tokenizer: Any, text: str, number: int, length: int) -> Tensor:
    """Tokens [length] of a file, other ones for each number."""
    characters = (TEXT / text).read_text(encoding="utf-8")[number * 6 * length :][: 10 * length]
    ids: Tensor = tokenizer(characters, return_tensors="pt").input_ids
    if ids.shape[1] < length:
        raise SystemExit(f"{text} has no passage {number} of {length} tokens")
    return ids[0, :length]


def filled(model: Any, ids: Tensor, piece: int) -> DynamicCache:
    """A cache that has read all tokens [time] but the last."""
    reading = begin(model, 1)
    with torch.no_grad():
        for part in ids[None, :-1].split(piece, 1):
            reading.read(part, keep=1)
    made: DynamicCache = reading.cache
    return made


@lru_cache(maxsize=1)
def begun(
    name: str, dtype: str, context: int, text: str, number: int, rows: int, piece: int
) -> tuple[list[Tensor], DynamicCache]:
    """Rows of tokens, and the cache that has read all of each but the last, for all drafts."""
    model, tokenizer = opened(name, dtype, context)
    ids = [passage(tokenizer, text, number * rows + row, context) for row in range(rows)]
    caches = [filled(model, row, piece) for row in ids]
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        _stack(layers)
    return ids, caches[0]


def _stack(layers: Sequence[Any]) -> None:
    """Put the rows of cache layers into the first of them."""
    first = layers[0]
    for attribute, value in state_attributes(first).items():
        if isinstance(value, Tensor):
            rows = [state_attributes(layer)[attribute] for layer in layers]
            setattr(first, attribute, torch.cat(rows))


def compare(table: Table, options: Namespace) -> None:
    """Decode each passage with each draft, and without one before and after."""
    for case in table.missing():
        rows = [one(case, options, number) for number in range(options.passages)]
        found = {k: statistics.median(row[k] for row in rows) for k in rows[0]}
        sums = {k: sum(row[k] for row in rows) for k in ("parted", "near ties")}
        table.add(case | found | sums | {"gap": max(row["gap"] for row in rows)})


def one(case: Row, options: Namespace, number: int) -> Row:
    """One passage: plain, with the draft, plain."""
    name, dtype, context = case["model"], case["dtype"], case["context"]
    model, _ = opened(name, dtype, context)
    rows, start = begun(name, dtype, context, options.text, number, options.rows, options.piece)
    runs = [
        speculate(
            model,
            rows,
            drafts,
            max_new_tokens=options.tokens,
            count=options.count or None,
            cache=copy.deepcopy(start),
        )
        for drafts in ([], drafts_of(model, case["draft"]), [])
    ]
    (plain, before), (tokens, report), (_, after) = runs
    rate = before.tokens / statistics.mean([before.seconds, after.seconds])
    proposed, accepted = (sum(x) for x in zip(*report.drafts.values(), strict=True))
    same = [
        int((one == other).long().cumprod(0).sum())
        for one, other in zip(plain, tokens, strict=True)
    ]
    gaps = [
        _gap(model, row[:first]) if first < len(row) else 0.0
        for row, first in zip(plain, same, strict=True)
    ]
    return {
        "plain, tokens/s": rate,
        "ratio": report.tokens / report.seconds / rate,
        "tokens a step": report.tokens / len(rows) / report.steps,
        "accepted": accepted / max(proposed, 1),
        "near ties": len(report.near_ties),
        "parted": sum(first < len(row) for row, first in zip(plain, same, strict=True)),
        "gap": max(gaps),
    }


def _gap(model: Any, row: Tensor) -> float:
    """How far the two best logits behind a row are apart, over the better one."""
    with torch.no_grad():
        best = model(row[None], logits_to_keep=1).logits[0, -1].float().topk(2).values
    return float((best[0] - best[1]) / best[0].abs())


def verification(table: Table, options: Namespace) -> None:
    """Time the model on k tokens behind a context, over one token."""
    for case in table.missing():
        model, _ = opened(case["model"], case["dtype"], case["context"])
        if case["products"] == "int8":
            model = twin(model, "int8")
        ids = torch.randint(model.config.vocab_size, (case["context"],))
        reading = Reading(model, filled(model, ids, options.piece))
        counts = [1, *map(int, options.counts)]
        sides = {
            str(k): partial(step, reading, ids[None, :k], case["products"] == "PyTorch's")
            for k in counts
        }
        times = medians(in_turns(sides, options.rounds))
        ratios = {f"k = {k}": times[str(k)] / times["1"] for k in counts[1:]}
        table.add(case | {"one token, ms": 1e3 * times["1"]} | ratios)


def step(reading: Reading, ids: Tensor, usual: bool) -> None:
    """Read some tokens behind a cache, and take them back."""
    with torch.no_grad():
        if usual:
            reading.module(ids, past_key_values=reading.cache)
        else:
            reading.read(ids)
    reading.take_back([ids.shape[1]])
