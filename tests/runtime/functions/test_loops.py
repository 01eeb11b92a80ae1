"""Loops beside layers that are in none: every layer has its own place in the cache."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache
from transformers.cache_utils import StaticLayer

from reroll.rewrite.capture import capture
from reroll.runtime.lowering.lower import lower
from reroll.runtime.state.caches import append_exactly
from tests import captured

pytestmark = pytest.mark.usefixtures("captured_once")


@cache
def pair(windows: bool) -> tuple[Any, Any]:
    """Six layers of which only the inner four are alike."""
    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention"] * 3 if windows else None
    config = transformers.SmolLM3Config(
        **{**captured.TEXT, "num_hidden_layers": 6}, **captured.SPECIAL, intermediate_size=48,
        num_key_value_heads=2, no_rope_layers=[0, 1, 1, 1, 1, 0], layer_types=kinds,
        use_sliding_window=windows, sliding_window=8 if windows else None,
    )  # fmt: skip
    original = transformers.SmolLM3ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in original.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return original, lower(capture(original))


def generate(model: Any, **options: Any) -> torch.Tensor:
    ids = torch.randint(3, 64, (3, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    wishes = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, **options}
    return model.generate(ids, attention_mask=mask, **wishes)  # type: ignore[no-any-return]


@pytest.mark.parametrize("windows", [False, True])
def test_some_layers_are_in_the_loop(windows: bool) -> None:
    _, lowered = pair(windows)
    layers = sum(
        len(loop.modules) * loop.layers_per_trip for loop in lowered._assembly.loops.values()
    )
    assert 0 < layers < 6
    assert len(lowered._assembly.layers) == 6


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"use_cache": False},
        {"prefill_chunk_size": 4},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=str,
)
def test_generation(windows: bool, options: dict[str, Any]) -> None:
    original, lowered = pair(windows)
    if "prompt_lookup_num_tokens" in options:
        ids = torch.randint(3, 64, (1, 11), generator=torch.Generator().manual_seed(1))
        results = [
            m.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None, **options)
            for m in (original, lowered)
        ]
    else:
        results = [generate(model, **options) for model in (original, lowered)]
    assert torch.equal(*results)


@pytest.mark.parametrize("windows", [False, True])
def test_a_conversation_goes_on_from_its_cache(windows: bool) -> None:
    results = []
    for model in pair(windows):
        cache = DynamicCache(config=model.config)
        ids = torch.randint(3, 64, (1, 9), generator=torch.Generator().manual_seed(1))
        for turn in range(3):
            ids = model.generate(
                ids, past_key_values=cache, max_new_tokens=4, do_sample=False, eos_token_id=None
            )
            ids = torch.cat([ids, torch.full((1, 3), 5 + turn)], dim=1)
        results.append(ids)
    assert torch.equal(*results)


def test_an_assistant_may_be_the_model_itself() -> None:
    original, lowered = pair(False)
    ids = torch.randint(3, 64, (1, 9), generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}
    expected = original.generate(ids, **options)
    assert torch.equal(expected, lowered.generate(ids, **options, assistant_model=lowered))


def test_keys_that_are_computed_with_have_no_empty_slots() -> None:
    layer = StaticLayer(16)
    k, v = torch.randn(2, 1, 2, 3, 4)
    for length in (3, 6):
        keys, values = append_exactly([layer], 0, k, v)
        assert keys.shape[2] == values.shape[2] == length
    assert torch.equal(keys[:, :, 3:], k)
