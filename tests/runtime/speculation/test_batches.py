"""Batches: each row gets its own tokens, however many of its drafted ones are accepted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import reroll
from reroll.runtime.speculation.reading import can_part
from tests.runtime.speculation.test_speculation import DELTA, SLOTS, captured, model

NEW = 24
LENGTHS = (20, 13, 17)
GENERATOR = torch.Generator().manual_seed(1)
ROWS = [torch.randint(3, 64, (n,), generator=GENERATOR) for n in LENGTHS]
IDS = torch.stack([torch.nn.functional.pad(row, (20 - len(row), 0)) for row in ROWS])
MASK = torch.tensor([[i >= 20 - n for i in range(20)] for n in LENGTHS]).long()


def plain(module: Any, **options: Any) -> torch.Tensor:
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None} | options
    out: torch.Tensor = module.generate(IDS, attention_mask=MASK, pad_token_id=0, **options)
    return out


@pytest.mark.parametrize(
    ("name", "passes", "draft", "parts"),
    [
        ("llama", "", "window(size=4, sinks=2)", True),
        ("llama", "", "window(size=6, sinks=0, layers=[1, 3])", True),
        ("llama", "", "window(size=4, sinks=2), int8", True),
        ("llama", "", "lookup", True),
        ("llama", "", DELTA, True),
        ("llama", "window(size=8, sinks=2)", "window(size=3, sinks=1)", True),
        ("llama", "window(size=40, sinks=2)", "tie(blocks=2)", True),
        ("llama", DELTA, "tie(blocks=2)", True),
        ("llama", SLOTS, "lookup", True),
        ("llama", SLOTS, "tie(blocks=2)", True),
        ("gemma3", "", "window(size=4, sinks=2)", True),
        ("lfm2", "", "window(size=4, sinks=2)", True),
        ("gpt2", "", "window(size=4, sinks=2)", True),
        ("bloom", "", "window(size=6, sinks=1)", False),
    ],
)
@pytest.mark.parametrize("count", [4, None])
def test_rows_have_their_own_tokens(
    name: str, passes: str, draft: str, parts: bool, count: int | None
) -> None:
    module = model(name, passes)
    assert can_part(module) is parts
    found = reroll.generate(
        module, IDS, draft, attention_mask=MASK, max_new_tokens=NEW, draft_tokens=count, ends=()
    )
    assert torch.equal(found, plain(module))
    report = module.speculation_report
    assert report.tokens == len(ROWS) * NEW
    if count is not None:
        # some row has kept more than others
        assert report.steps < NEW + 1 or draft == "lookup"


def test_rows_that_end_leave_the_batch() -> None:
    tokens = plain(model())
    end = int(tokens[1, 20 + 5])
    expected = plain(model(), eos_token_id=end)
    found = reroll.generate(
        model(), IDS, "window(size=6)", attention_mask=MASK, max_new_tokens=NEW, ends={end}
    )
    added = [row[: row.index(end) + 1] if end in row else row for row in found[:, 20:].tolist()]
    wanted = [row[: row.index(end) + 1] if end in row else row for row in expected[:, 20:].tolist()]
    assert added == wanted
    assert len({len(row) for row in added}) > 1


def test_each_row_is_what_it_is_alone() -> None:
    module = captured.captured("llama", torch.bfloat16).to_module()
    found = reroll.generate(module, IDS, "window(size=6)", attention_mask=MASK, max_new_tokens=NEW)
    ties = {(tie.row, tie.place) for tie in module.speculation_report.near_ties}
    expected = plain(module)
    for number, (row, wanted) in enumerate(zip(found, expected, strict=True)):
        same = int((row == wanted).long().cumprod(0).sum())
        assert same == len(wanted) or any(r == number and p <= same - 20 for r, p in ties)
