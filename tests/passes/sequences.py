"""What tests of the sequence passes share: padded prompts, and models run in parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache


def prompts(rows: int = 2, length: int = 23) -> dict[str, Tensor]:
    """Random tokens; the second row begins with padding."""
    ids = torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1:2, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


def in_parts(model: Any, inputs: dict[str, Tensor], splits: list[int]) -> tuple[Tensor, Any]:
    """Logits of a sequence that comes in parts, and the cache that it has filled."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    past, done, parts = DynamicCache(config=model.config), 0, []
    for length in splits:
        now = slice(done, done + length)
        done += length
        out = model(ids[:, now], attention_mask=mask[:, :done], past_key_values=past)
        parts.append(out.logits)
    return torch.cat(parts, 1), past


def generate(model: Any, **how: Any) -> Tensor:
    """Twenty tokens for padded prompts, from one seed."""
    torch.manual_seed(0)
    wishes = {"max_new_tokens": 20, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
    out: Tensor = model.generate(**prompts(length=11), **{**wishes, **how})
    return out
