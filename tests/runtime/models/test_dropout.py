"""A lowered model does not drop out in training, and says so where its original does."""

from __future__ import annotations

import copy
import logging

import pytest
import torch

from reroll.export.model_card import model_card
from tests.captured import captured, model

IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))


def test_training_computes_what_evaluation_computes(caplog) -> None:
    original, lowered = copy.deepcopy(model("gpt2")), captured("gpt2").to_module()
    with torch.no_grad():
        expected = lowered(IDS).logits
        # the original of the same configuration does drop out
        assert not torch.allclose(original.train()(IDS).logits, expected, atol=1e-2)
        with caplog.at_level(logging.WARNING, "reroll"):
            lowered.train()
            lowered.eval()
            lowered.train()
        torch.testing.assert_close(lowered(IDS, use_cache=False).logits, expected)
    (said,) = [r.getMessage() for r in caplog.records if "drops out" in r.getMessage()]
    assert "resid_pdrop=0.1" in said
    assert said.startswith("RerollForCausalLM")


def test_dropout_of_an_adapter_works() -> None:
    from peft import LoraConfig, get_peft_model

    options = {"target_modules": ["q_proj"], "lora_dropout": 0.5, "init_lora_weights": False}
    adapted = get_peft_model(captured("llama").to_module(), LoraConfig(r=4, **options))
    with torch.no_grad():
        first, second = (adapted.train()(IDS, use_cache=False).logits for _ in range(2))
        assert not torch.allclose(first, second, atol=1e-2)
        assert torch.equal(adapted.eval()(IDS).logits, adapted(IDS).logits)


@pytest.mark.parametrize(("name", "said"), [("gpt2", True), ("bert", True), ("llama", False)])
def test_the_card_says_it(name: str, said: bool) -> None:
    assert ("the original drops out" in model_card(captured(name))) == said


def test_nothing_is_said_where_nothing_drops_out(caplog) -> None:
    with caplog.at_level(logging.WARNING, "reroll"):
        captured("llama").to_module().train()
    assert not [r for r in caplog.records if "drops out" in r.getMessage()]
