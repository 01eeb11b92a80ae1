"""The lowered module beside transformers, on tiny models: tokens, losses, gradients, caches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from reroll.errors import UsageError
from reroll.rewrite.capture.export import capture
from tests import captured

pytestmark = pytest.mark.usefixtures("captured_once")

MAKERS = ["llama", "qwen2", "gemma3", "gpt2"]
NEW_TOKENS = 20


@pytest.fixture(scope="module", params=MAKERS)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """An original in eval mode, and the module lowered from its rolled Program."""
    torch.manual_seed(0)
    original = getattr(captured, request.param)().eval()
    return original, capture(original).to_module().eval()


def padded(batch: int = 3, length: int = 11) -> dict[str, torch.Tensor]:
    """Prompts of different lengths, padded on the left."""
    ids = torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4], mask[1, :2] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: Any, **options: Any) -> torch.Tensor:
    torch.manual_seed(0)
    wishes = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None}
    return model.generate(**padded(), **{**wishes, "pad_token_id": 0, **options})


def test_greedy_with_left_padding(pair: tuple[Any, Any]) -> None:
    original, lowered = pair
    assert torch.equal(generate(original), generate(lowered))


def test_beams(pair: tuple[Any, Any]) -> None:
    original, lowered = pair
    assert torch.equal(generate(original, num_beams=3), generate(lowered, num_beams=3))


def test_sampling_with_one_seed(pair: tuple[Any, Any]) -> None:
    original, lowered = pair
    options = {"do_sample": True, "temperature": 0.8, "top_k": 20}
    assert torch.equal(generate(original, **options), generate(lowered, **options))


@pytest.mark.parametrize(
    "options",
    [{"use_cache": False}, {"prefill_chunk_size": 4}, {"cache_implementation": "static"}],
    ids=["no cache", "chunked prefill", "static cache"],
)
def test_every_way_of_keeping_state_gives_the_same_tokens(
    pair: tuple[Any, Any], options: dict[str, Any]
) -> None:
    _, lowered = pair
    assert torch.equal(generate(lowered), generate(lowered, **options))


def test_loss_and_gradients_with_and_without_checkpointing(pair: tuple[Any, Any]) -> None:
    original, _ = pair
    inputs = {"input_ids": padded()["input_ids"], "labels": padded()["input_ids"]}
    expected = original(**inputs, use_cache=False).loss
    lowered = capture(original).to_module().train()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            lowered.gradient_checkpointing_enable()
        lowered.zero_grad()
        loss = lowered(**inputs).loss
        torch.testing.assert_close(loss, expected)
        loss.backward()
        grads.append({n: p.grad.clone() for n, p in lowered.named_parameters()})
    assert grads[0].keys() == grads[1].keys()
    assert any(g.abs().max() > 0 for g in grads[0].values())
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name])


def test_logits_to_keep(pair: tuple[Any, Any]) -> None:
    _, lowered = pair
    inputs = padded()
    whole = lowered(**inputs).logits
    torch.testing.assert_close(lowered(**inputs, logits_to_keep=2).logits, whole[:, -2:])


def test_parameters_have_the_original_names(pair: tuple[Any, Any]) -> None:
    original, lowered = pair
    assert {n for n, _ in original.named_parameters()} == {n for n, _ in lowered.named_parameters()}


def test_embeddings_instead_of_tokens(pair: tuple[Any, Any]) -> None:
    _, lowered = pair
    inputs = padded()
    mask = inputs["attention_mask"]
    embeddings = lowered.get_input_embeddings()(inputs["input_ids"])
    expected = lowered(**inputs)
    actual = lowered(inputs_embeds=embeddings, attention_mask=mask)
    assert torch.equal(actual.logits, expected.logits)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    tokens = lowered.generate(inputs_embeds=embeddings, attention_mask=mask, **options)
    assert torch.equal(tokens, generate(lowered, max_new_tokens=5)[:, -5:])
    with pytest.raises(UsageError, match="both tokens and embeddings"):
        lowered(**inputs, inputs_embeds=embeddings)


def test_drafting_with_its_first_layers_is_refused_and_leaves_the_model_as_it_was(
    pair: tuple[Any, Any],
) -> None:
    _, lowered = pair
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    before = lowered.generate(**padded(), **options)
    with pytest.raises(UsageError, match="assistant_early_exit"):
        lowered.generate(**padded(), **options, assistant_early_exit=1)
    assert torch.equal(lowered.generate(**padded(), **options), before)
