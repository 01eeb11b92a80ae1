"""Sample text from a model itself, to recover a rewritten model where there is no other text.

A model's training text is rarely available, and training on a few domains shifts the rewritten
model towards them. Samples from the original's own distribution cover what it was trained on, and
need no text (data-free distillation: Liu et al., 2023, arXiv 2305.17888).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from reroll.bounds import COUNT, SEED, check_number
from reroll.evaluate.generation import check_room
from reroll.evaluate.tokenizing import check_utf8


def sampled_texts(
    model: Any,
    tokenizer: Any,
    *,
    tokens: int,
    length: int,
    batch: int,
    start: str | None = None,
    seed: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[str]:
    """Yield texts of at most `length` tokens, `tokens` in all, sampled at temperature 1.

    `model` is a causal language model of transformers with its `tokenizer`. `batch` texts are
    sampled at a time; `seed` determines all of them. A text begins after the prompt `start`, which
    is not part of it. By default that is the tokenizer's first token, or its last one if it has
    none. A text ends at the model's end-of-text token or at `length`.
    """
    for name, count in (("tokens", tokens), ("length", length), ("batch", batch)):
        check_number(name, count, COUNT, "sampled_texts")
    check_number("seed", seed, SEED, "sampled_texts")
    ends = tokenizer.eos_token_id
    if start is None:
        first = tokenizer.bos_token_id
        ids = [ends if first is None else first]
    else:
        check_utf8(start, "--start")
        ids = list(tokenizer(start, add_special_tokens=False).input_ids)
    check_room(model, len(ids), length)
    prompt = torch.tensor([ids] * batch, device=model.device)
    done, round_ = 0, 0
    while done < tokens:
        torch.manual_seed(seed * 1_000_003 + round_)
        with torch.inference_mode():
            written: Tensor = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=True, temperature=1.0,
                top_k=0, top_p=1.0, max_new_tokens=length, pad_token_id=ends,
            )  # fmt: skip
        for row in written[:, len(ids) :].tolist():
            if done >= tokens:
                return
            generated = row[: row.index(ends)] if ends in row else row
            text = tokenizer.decode(generated, skip_special_tokens=True).strip()
            done += len(generated)
            if text:
                yield text
        round_ += 1
        on_progress(min(done, tokens), tokens)
