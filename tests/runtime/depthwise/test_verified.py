"""Early tokens that are verified give what the full depth gives."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import reroll
from reroll.errors import UsageError
from reroll.runtime.depthwise import VerifiedScheduler
from tests import captured

PROMPTS = [torch.tensor(row) for row in ([5, 6, 7, 8], [9, 10, 11], [30, 4, 17, 21, 40, 12])]
NEW = 16


@cache
def lowered(exits: str, name: str = "llama", passes: str = "") -> Any:
    pipeline = ", ".join(filter(None, [passes, f"insert_exits({exits}, state=defer)"]))
    return reroll.run_passes(captured.captured(name), pipeline, measure="off").to_module()


@cache
def plain(number: int, name: str = "llama", passes: str = "") -> list[int]:
    program = captured.captured(name)
    if passes:
        program = reroll.run_passes(program, passes, measure="off")
    ids = PROMPTS[number][None]
    out = program.to_module().generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("ahead", [1, 3])
@pytest.mark.parametrize(
    ("exits", "name", "passes"),
    [
        ("at=[1, 3], threshold=0.01", "llama", ""),
        ("at=[2], threshold=0.05", "llama", "tie(blocks=2)"),
        ("at=[1], threshold=-1", "llama", ""),
        ("at=[2], threshold=0.02, head=norm", "llama", ""),
        ("at=[1, 2], threshold=0.02", "gemma3", ""),
    ],
)
def test_tokens_are_those_of_the_full_depth(exits, name, passes, ahead) -> None:
    for slots in (1, 2):
        with VerifiedScheduler(
            lowered(exits, name, passes), slots=slots, length=64, ahead=ahead
        ) as scheduler:
            numbers = [scheduler.submit(p, max_new_tokens=NEW) for p in PROMPTS]
            for number in numbers:
                found = list(scheduler.stream(number))
                assert found == plain(number - 1, name, passes)
            assert scheduler.given > 0


def test_waiting_trips_run_with_those_of_later_tokens() -> None:
    """Every token leaves after a trip, so that four of them make one batch of the others."""
    with VerifiedScheduler(lowered("at=[1], threshold=-1"), slots=1, length=64, ahead=4) as made:
        number = made.submit(PROMPTS[0], max_new_tokens=6)
        made.tick()
        while len(made._guesses[0]) < 4:
            made.tick()
        before = made.counts.batches
        assert len(made._rows) == 4
        assert before == 4
        while made._guesses[0]:
            made.tick()
        assert made.counts.batches == before + 3
        assert made.tokens(number)[:2] == plain(0)[:2]


def test_a_token_that_goes_on_takes_those_along_that_have_waited() -> None:
    model = lowered("at=[1], threshold=0.02")
    with VerifiedScheduler(model, slots=1, length=64, ahead=8) as scheduler:
        scheduler.submit(PROMPTS[2], max_new_tokens=NEW)
        together = []
        while True:
            scheduler.tick()
            if not scheduler._rows:
                break
            batch = scheduler.engine.batch
            together.append(len(batch.rows) if batch is not None else 0)
    assert max(together) > 1


def test_a_stop_token_ends_a_request() -> None:
    tokens = plain(0)
    stop = tokens[5]
    with VerifiedScheduler(lowered("at=[1], threshold=-1"), slots=1, length=64) as scheduler:
        number = scheduler.submit(PROMPTS[0], max_new_tokens=NEW, stop=[stop])
        assert list(scheduler.stream(number)) == tokens[: tokens.index(stop) + 1]


def test_what_it_refuses() -> None:
    program = reroll.run_passes(captured.captured("llama"), "insert_exits(at=[2])", measure="off")
    with pytest.raises(UsageError, match="exact caches"):
        VerifiedScheduler(program.to_module(), slots=1, length=32)
    with pytest.raises(UsageError, match="ahead"):
        VerifiedScheduler(lowered("at=[1], threshold=-1"), ahead=0)
