"""One compiled body serves all trips, with and without a cache; the whole model is one graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import StaticCache

from reroll.runtime.lowering.lower import lower
from tests import captured

IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def counter() -> Iterator[Any]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield CompileCounter()
    torch._dynamo.reset()


def compiled(name: str, counter: Any) -> tuple[Any, Any]:
    """A lowered model as it is, and one whose trips are compiled without graph breaks."""
    models = lower(captured.captured(name)), lower(captured.captured(name))
    models[1].compile_trips(backend=counter, fullgraph=True)
    assert len(models[1].trip_modules()) == 4
    return models


def test_the_body_is_compiled_once_for_all_trips(counter: Any) -> None:
    expected, model = compiled("llama", counter)
    actual = model(IDS, use_cache=False).logits
    torch.testing.assert_close(actual, expected(IDS, use_cache=False).logits)
    assert counter.frame_count == 1


def test_training_compiles_it_once_too(counter: Any) -> None:
    _, model = compiled("llama", counter)
    with torch.enable_grad():
        model(IDS, labels=IDS, use_cache=False).loss.backward()
    assert counter.frame_count == 1
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("static", [False, True])
def test_a_cache_costs_one_compilation_per_form(counter: Any, static: bool) -> None:
    models = compiled("llama", counter)
    caches = [StaticCache(m.config, max_cache_len=32) if static else None for m in models]
    counts = []
    for step in range(6):
        ids = IDS if step == 0 else IDS[:, :1]
        outs = [
            m(ids, past_key_values=c, use_cache=True) for m, c in zip(models, caches, strict=True)
        ]
        torch.testing.assert_close(outs[1].logits, outs[0].logits)
        caches = [out.past_key_values for out in outs]
        counts.append(counter.frame_count)
    # the prefill, one step, and for a growing cache the step for any length
    assert counts == ([1, 2, 2, 2, 2, 2] if static else [1, 2, 3, 3, 3, 3])


def test_trips_with_different_constants_compile_once_per_constant(counter: Any) -> None:
    expected, model = compiled("gemma3", counter)
    actual = model(IDS, use_cache=False).logits
    torch.testing.assert_close(actual, expected(IDS, use_cache=False).logits)
    # with and without a mask: 9 tokens are more than a window of 8
    assert counter.frame_count == 2


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "t5", "bert"])
def test_the_whole_model_is_one_graph(counter: Any, name: str) -> None:
    model = lower(captured.captured(name))
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    if name == "t5":
        inputs["decoder_input_ids"] = IDS
    whole = torch.compile(model, backend=counter, fullgraph=True)
    torch.testing.assert_close(whole(**inputs)[0], model(**inputs)[0])
    assert counter.frame_count == 1
