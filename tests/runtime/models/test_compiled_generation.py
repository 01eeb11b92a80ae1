"""Decoding with a static cache is one compiled graph, with the tokens of a decoding that is not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig, StaticCache

from reroll.rewrite.pipeline.manager import run_passes
from reroll.runtime.state.states import restore, snapshot
from tests import captured
from tests.slow import slow

IDS = torch.randint(3, 60, (2, 20), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :3] = 0
SLOTS = "mixer=gsa, mixer_options={slots: 8}, gates=clustered, samples=2, combine=joint"

KINDS = {
    "plain": ("llama", "", 1),
    "layer norms": ("gpt2", "", 1),
    "positions of the mask": ("opt", "", 1),
    "tied": ("llama", "tie(blocks=1), relax(rank=2)", 1),
    "window": ("llama", "window(size=4, sinks=1)", 1),
    "some windows": ("llama", "window(size=4, sinks=2, layers=[1, 2])", 1),
    "delta": ("llama", "linearize(mixer=gated_deltanet, window=4, sinks=1)", 1),
    "no window": ("llama", "linearize(mixer=gla, window=0)", 1),
    "some recurrences": ("llama", "linearize(mixer=gla, window=4, layers=[1, 2])", 1),
    "slots": ("llama", f"linearize({SLOTS}, window=4, sinks=1)", 1),
    "exits": ("llama", "insert_exits(at=[1], threshold=0.05)", 1),
    # transformers' sliding layer counts its tokens in Python: the original has two graphs as well
    "sliding": ("gemma3", "", 2),
}
QUICK = ("plain", "positions of the mask", "window", "delta", "exits", "sliding")


def made(kind: str) -> Any:
    name, passes, _ = KINDS[kind]
    program = captured.captured(name)
    if passes:
        tokens = lambda text: [3 + ord(c) % 60 for c in text]  # noqa: E731
        program = run_passes(program, passes, measure=False, tokenizer=tokens)
    return program.to_module()


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def tokens(model: Any, padded: bool, **options: Any) -> torch.Tensor:
    mask = MASK[:, :7] if padded else None
    settings = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    out: torch.Tensor = model.generate(IDS[:, :7], attention_mask=mask, **settings, **options)
    return out


@pytest.mark.parametrize("kind", [*QUICK, *slow(*(kind for kind in KINDS if kind not in QUICK))])
def test_decoding_is_one_graph(kind: str) -> None:
    model = made(kind)
    config = CompileConfig(fullgraph=True, dynamic=None, mode=None, backend="eager")
    # `generate` compiles on a GPU alone, if it is not told otherwise
    config._compile_all_devices = True
    compiled = tokens(model, True, cache_implementation="static", compile_config=config)
    assert torch.equal(compiled, tokens(model, True))
    assert counters["stats"]["unique_graphs"] == KINDS[kind][2]
    assert not counters["graph_break"]
    assert model._can_compile_fullgraph


@pytest.mark.parametrize("name", ["bloom", "indexer"])
def test_a_model_that_does_not_decode_in_one_graph_says_so(name: str) -> None:
    assert not captured.captured(name).to_module()._can_compile_fullgraph


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["window", "some windows", "delta", "no window", "slots"])
def test_a_static_cache_gives_the_logits_of_none(kind: str, padded: bool) -> None:
    model = made(kind)
    mask = MASK if padded else None
    positions = (MASK.cumsum(-1) - 1).clamp(min=0) if padded else torch.arange(20).expand(2, -1)
    with torch.no_grad():
        expected = model(IDS, attention_mask=mask, position_ids=positions, use_cache=False).logits
        cache, start = StaticCache(model.config, max_cache_len=20), 0
        saved: Any = None
        # the first tokens come one by one, so that first tokens and windows fill up in steps
        for length in (1, 2, 1, 5, 1, 1, 4, 1, 1, 3):
            if start == 9:
                saved = snapshot(cache)
            end = start + length
            out = model(
                IDS[:, start:end],
                attention_mask=None if mask is None else mask[:, :end],
                position_ids=positions[:, start:end],
                past_key_values=cache,
            ).logits
            visible = MASK[:, start:end].bool() if padded else torch.ones(2, length).bool()
            torch.testing.assert_close(
                out[visible], expected[:, start:end][visible], rtol=1e-4, atol=1e-4
            )
            start = end
        assert cache.is_compileable
        # a snapshot is not written to
        restore(cache, saved)
        again = model(
            IDS[:, 9:10],
            attention_mask=None if mask is None else mask[:, :10],
            position_ids=positions[:, 9:10],
            past_key_values=cache,
        ).logits
        torch.testing.assert_close(again[:, 0], expected[:, 9], rtol=1e-4, atol=1e-4)


def test_a_cache_that_is_reset_begins_anew() -> None:
    model = made("delta")
    with torch.no_grad():
        cache = StaticCache(model.config, max_cache_len=20)
        first = model(IDS[:, :9], past_key_values=cache).logits
        model(IDS[:, 9:10], past_key_values=cache)
        cache.reset()
        assert int(cache.get_seq_length()) == 0
        torch.testing.assert_close(model(IDS[:, :9], past_key_values=cache).logits, first)
        after = model(IDS[:, 9:10], past_key_values=cache).logits
        expected = model(IDS[:, :10], use_cache=False).logits[:, -1:]
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)
