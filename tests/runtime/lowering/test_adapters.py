"""peft on a lowered model: one adapter per depth, also where depths share a weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from reroll.rewrite.pipeline.manager import run_passes
from reroll.runtime import untie
from tests import captured

IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))


def lowered(passes: str) -> Any:
    program = captured.captured("llama")
    if passes:
        program = run_passes(program, passes, measure=False)
    return program.to_module().eval()


def adapted(model: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))


def trained(model: Any, steps: int = 3) -> Any:
    wanted = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(wanted, lr=1.0)
    for _ in range(steps):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    return model.eval()


PASSES = ["", "tie(blocks=2)"]


def test_every_trip_of_a_tied_loop_gets_an_adapter_of_its_own() -> None:
    model = lowered("tie(blocks=2)")
    before = model(IDS).logits
    layers = [model.get_submodule(f"model.layers.{t}.self_attn.q_proj") for t in (0, 2)]
    assert layers[0] is not layers[1]
    assert layers[0].weight is layers[1].weight
    peft_model = adapted(model)
    assert torch.equal(peft_model(IDS).logits, before)
    trainable = [n for n, p in peft_model.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * 2 * 4
    peft_model(IDS, labels=IDS).loss.backward()
    grads = [p.grad for n, p in peft_model.named_parameters() if "q_proj" in n and "lora_B" in n]
    assert len({tuple(g.flatten().tolist()) for g in grads}) == 4


@pytest.mark.parametrize("passes", PASSES)
def test_adapters_are_saved_and_loaded(tmp_path: Path, passes: str) -> None:
    model = trained(adapted(lowered(passes)))
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(lowered(passes), str(tmp_path)).eval()
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("passes", PASSES)
def test_a_merge_after_untying_is_exact(tmp_path: Path, passes: str) -> None:
    base = lowered(passes)
    model = trained(adapted(base))
    expected = model(IDS).logits
    untie(base)
    assert torch.equal(model(IDS).logits, expected)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, expected)
    merged.save_pretrained(str(tmp_path))
    again = AutoModelForCausalLM.from_pretrained(str(tmp_path))
    assert torch.equal(again(IDS).logits, merged(IDS).logits)
    # only what had an adapter is stored once per depth now
    weights = again.program.weights
    assert weights["model.layers.*.mlp.up_proj.weight"].index == (0, 1, 2, 3)
    kept = (0, 1, 2, 3) if not passes else (0, 0, 1, 1)
    assert weights["model.layers.*.mlp.down_proj.weight"].index in (kept, (0, 1, 0, 1))


def test_generation_with_adapters() -> None:
    model = trained(adapted(lowered("tie(blocks=2)")))
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(
        model.generate(input_ids=IDS, **options),
        model.generate(input_ids=IDS, use_cache=False, **options),
    )


def test_checkpointing_with_adapters_gives_the_same_gradients() -> None:
    grads = []
    for checkpointing in (False, True):
        model = adapted(lowered("")).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(IDS, labels=IDS).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)
