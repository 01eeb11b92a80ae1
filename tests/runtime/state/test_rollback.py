"""Tokens that are taken back out of a cache leave it as if they had never been read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import reroll
from reroll.errors import UsageError
from reroll.rewrite.analysis.state_plan import CacheLayer
from reroll.rewrite.analysis.tolerances import forward, relative_rms
from reroll.runtime.state.growing import keep, take_back
from tests import captured
from tests.runtime.state.reading import KINDS, TIME, Reader, named

# those with a class of reroll's own for caches of constant shapes
OWN = [k for k in KINDS if k.layer_type == "hybrid_sliding" or k.prefix]
# of each round: how many tokens are read, call by call, and how many are taken back
ROUNDS: list[tuple[Sequence[int], int]] = [
    ((6,), 0), ((3,), 2), ((1,), 1), ((1,), 0), ((2, 1, 3), 5), ((7,), 4), ((4,), 4), ((5,), 1),
]  # fmt: skip


def paddings() -> list[Tensor | None]:
    left = torch.ones(2, TIME, dtype=torch.bool)
    left[0, :3] = False
    return [None, left]


@pytest.mark.parametrize("padding", paddings(), ids=["whole", "left"])
@pytest.mark.parametrize("planned", KINDS, ids=named)
def test_what_is_taken_back_was_never_read(planned: CacheLayer, padding: Tensor | None) -> None:
    found, wanted = Reader(planned, padding), Reader(planned, padding)
    found.cache.activate_past_recording()
    for reads, removed in ROUNDS:
        start = found.length
        for count in reads:
            found.read(count)
        take_back(found.cache, removed)
        end = start + sum(reads) - removed
        assert found.length == end
        for count in reads:
            if wanted.length < end:
                wanted.read(min(count, end - wanted.length))
        # whatever it is asked next
        for count in (1, 3):
            probe = found.read(count)
            take_back(found.cache, count)
            alone = Reader(planned, padding)
            for length in (end, count):
                expected = alone.read(length)
            torch.testing.assert_close(probe, expected, rtol=1e-11, atol=1e-12)
    assert torch.equal(found.read(2), wanted.read(2))


@pytest.mark.parametrize("planned", OWN, ids=named)
def test_layers_of_constant_shapes_take_back_as_well(planned: CacheLayer) -> None:
    found, wanted = (Reader(planned, None, static=True) for _ in range(2))
    found.layers[0].activate_past_recording()
    for reads, removed in ROUNDS:
        end = found.length + sum(reads) - removed
        for count in reads:
            found.read(count)
        found.layers[0].crop(-removed)
        assert found.length == end
        for count in reads:
            if wanted.length < end:
                wanted.read(min(count, end - wanted.length))
    torch.testing.assert_close(found.read(2), wanted.read(2), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("planned", KINDS, ids=named)
def test_any_of_the_last_tokens_can_be_kept(planned: CacheLayer) -> None:
    for past in (1, 6, 15):
        found, wanted = Reader(planned, None), Reader(planned, None)
        found.cache.activate_past_recording()
        kept = torch.tensor([0, 2, 3])
        for reader in (found, wanted):
            reader.read(past)
        found.read(6)
        keep(found.cache, kept, 6)
        wanted.read(3, past + kept)
        for count in (1, 4):
            assert found.length == wanted.length
            torch.testing.assert_close(
                found.read(count), wanted.read(count), rtol=1e-11, atol=1e-12
            )


def test_what_was_not_recorded_is_not_taken_back() -> None:
    for planned in KINDS:
        if planned.layer_type == "full_attention":
            continue
        for undo in (lambda cache: take_back(cache, 2), lambda cache: keep(cache, Tensor([]), 2)):
            reader = Reader(planned, None)
            reader.read(20)
            with pytest.raises((UsageError, RuntimeError), match=r"undone|recorded|track past"):
                undo(reader.cache)


@pytest.mark.parametrize(
    ("name", "passes"),
    [
        ("llama", ""),
        ("llama", "window(size=4, sinks=2)"),
        ("llama", "linearize(mixer=gated_deltanet, window=4, sinks=1)"),
        ("llama", "linearize(mixer=mlstm, layers=[1, 2])"),
        ("llama", "insert_exits(at=[2], threshold=0.05)"),
        ("gemma3", ""),
        ("lfm2", ""),
        ("bloom", ""),
        ("indexer", ""),
    ],
)
def test_a_model_goes_on_as_if_it_had_not_read_them(name: str, passes: str) -> None:
    program = captured.captured(name)
    if passes:
        program = reroll.run_passes(program, passes, measure="off")
    module = program.to_module()
    ids = torch.randint(3, 64, (2, 30), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0

    def reading(record: bool) -> tuple[Any, Callable[[int], Tensor]]:
        cache = DynamicCache(config=module.config)
        if record:
            cache.activate_past_recording()

        def read(count: int) -> Tensor:
            start = cache.get_seq_length()
            now = ids[:, start : start + count]
            inputs = {"attention_mask": mask[:, : start + count], "past_key_values": cache}
            logits: Tensor = module(now, **inputs).logits
            return logits

        return cache, read

    (cache, found), (_, wanted) = reading(True), reading(False)
    with torch.no_grad():
        for reads, removed in ROUNDS:
            start = cache.get_seq_length()
            for count in reads:
                found(count)
            take_back(cache, removed)
            left = sum(reads) - removed
            for count in reads:
                now = min(count, left)
                left -= now
                if now:
                    wanted(now)
            assert cache.get_seq_length() == start + sum(reads) - removed
        # products of other shapes before it
        assert relative_rms(found(3), wanted(3)) <= forward(torch.float32)
