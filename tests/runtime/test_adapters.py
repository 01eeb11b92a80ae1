"""peft on a lowered model: one adapter per depth, also where depths share a weight."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model

from reroll.rewrite.capture.export import capture
from reroll.rewrite.passes.manager import run_passes
from tests import captured


def test_every_trip_of_a_tied_loop_gets_an_adapter_of_its_own() -> None:
    torch.manual_seed(0)
    program = run_passes(capture(captured.llama().eval()), "tie(blocks=2)", measure=False)
    model = program.to_module().eval()
    ids = torch.randint(3, 64, (2, 9))
    before = model(ids).logits
    layers = [model.get_submodule(f"model.layers.{t}.self_attn.q_proj") for t in (0, 2)]
    assert layers[0] is not layers[1]
    assert layers[0].weight is layers[1].weight
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))
    torch.testing.assert_close(adapted(ids).logits, before)
    trainable = [n for n, p in adapted.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * 4
    loss = adapted(ids, labels=ids).loss
    loss.backward()
    grads = [p.grad for n, p in adapted.named_parameters() if "lora_B" in n]
    assert len({tuple(g.flatten().tolist()) for g in grads}) == 4
