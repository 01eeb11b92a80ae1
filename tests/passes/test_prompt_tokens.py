"""Prompt tokens: the model as it was, and embeddings that stand behind a text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from reroll.errors import PassError
from reroll.rewrite.ir.program import Program
from reroll.rewrite.pipeline.manager import run_passes
from tests import captured
from tests.conformance.pass_suite import PassSuite

IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))
# two prompt tokens behind the text
BEHIND = torch.tensor([0] * 10 + [1, 2]).expand(2, -1)


def prompted(name: str = "llama", then: str = "") -> Program:
    return run_passes(captured.captured(name), f"prompt_tokens(count=2){then}", measure=False)


class TestSuite(PassSuite):
    pipeline = "prompt_tokens"


@pytest.mark.parametrize("name", ["llama", "gemma3", "lfm2", "gpt2"])
def test_they_stand_for_embeddings(name: str) -> None:
    module, original = prompted(name).to_module(), captured.model(name)
    rows = torch.randn(2, 32)
    with torch.no_grad():
        module.get_parameter("prompt_tokens.weight").copy_(rows)
        assert torch.equal(module(IDS).logits, captured.captured(name).to_module()(IDS).logits)
        found = module(IDS, prompt_tokens=BEHIND).logits
        embedded = original.get_input_embeddings()(IDS)
        embedded[:, 10:] = rows
        expected = original(inputs_embeds=embedded).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_they_begin_as_the_embeddings_of_tokens(name: str) -> None:
    module = prompted(name).to_module()
    same = torch.cat([IDS[:, :10], torch.tensor([[32, 33]] * 2)], 1)
    with torch.no_grad():
        found = module(IDS, prompt_tokens=BEHIND).logits
        expected = module(same).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_they_are_saved_and_loaded(tmp_path: Path) -> None:
    program = prompted()
    program.save(str(tmp_path / "prompted"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "prompted")
    with torch.no_grad():
        found = loaded(IDS, prompt_tokens=BEHIND).logits
        assert torch.equal(found, program.to_module()(IDS, prompt_tokens=BEHIND).logits)


def test_models_that_do_not_fit_are_refused() -> None:
    with pytest.raises(PassError, match="predicts no next token"):
        prompted("bert")
    with pytest.raises(PassError, match="already"):
        prompted(then=", prompt_tokens")
    with pytest.raises(PassError, match="there are 64 tokens"):
        run_passes(captured.captured("llama"), "prompt_tokens(count=65)", measure=False)
