"""Rows that are padded behind their prompt go on as each of them alone."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from tests.runtime.speculation.test_speculation import DELTA, SLOTS, model

LENGTHS = (20, 13, 17, 2)
TOKENS = torch.randint(3, 64, (4, 32), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "passes"),
    [
        ("llama", ""),
        ("llama", "window(size=6, sinks=2)"),
        ("llama", "window(size=25)"),
        ("llama", DELTA),
        ("llama", SLOTS),
        ("gpt2", "window(size=6, sinks=1)"),
    ],
)
@pytest.mark.parametrize("chunks", [[20], [7, 13]])
@pytest.mark.parametrize("recording", [False, True])
def test_it_takes_no_place(name: str, passes: str, chunks: list[int], recording: bool) -> None:
    """A prompt padded on the right, then some tokens at once, then single ones."""
    module = model(name, passes)
    cache = DynamicCache(config=module.config)
    prompt = torch.tensor([[at < n for at in range(20)] for n in LENGTHS]).long()
    rows = [
        torch.cat([row[:n], row[:1].expand(20 - n), row[n:]])[:28]
        for row, n in zip(TOKENS, LENGTHS, strict=True)
    ]
    tokens = torch.stack(rows)
    mask = torch.nn.functional.pad(prompt, (0, 8), value=1)
    positions, at, found = (mask.cumsum(1) - 1).clamp(min=0), 0, []
    with torch.no_grad():
        for number, count in enumerate([*chunks, 5, 1, 1, 1]):
            new = slice(at, at + count)
            out = module(
                tokens[:, new], attention_mask=mask[:, : at + count], past_key_values=cache,
                position_ids=positions[:, new],
            )  # fmt: skip
            if recording and number == 0:
                cache.activate_past_recording()
            at += count
            found.append(out.logits)
        for row, length in enumerate(LENGTHS):
            wanted = module(TOKENS[row : row + 1, : length + 8]).logits[0, length:]
            given = torch.cat(found[len(chunks) :], 1)[row]
            torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-4)
