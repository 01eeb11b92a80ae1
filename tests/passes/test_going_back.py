"""Going back in a state of constant size: snapshots, and a recording that is cropped."""

from __future__ import annotations

import pytest
import torch

from reroll.rewrite.pipeline.manager import run_passes
from reroll.runtime.state.states import restore, snapshot
from tests.captured import captured
from tests.passes.sequences import in_parts, prompts


@pytest.mark.parametrize(
    "text",
    [
        "window(size=5, sinks=2, keep=2)",
        "linearize(window=5, sinks=2, gain=0.5, keep=2, feature_map=hedgehog)",
        "linearize(mixer=mlstm, window=0, keep=[1])",
    ],
)
@torch.no_grad()
def test_going_back(text: str) -> None:
    program = run_passes(captured("llama"), text, measure=False)
    model, inputs = program.to_module(), prompts()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    expected, _ = in_parts(model, inputs, [23])
    _, cache = in_parts(model, {"input_ids": ids[:, :9], "attention_mask": mask[:, :9]}, [9])
    saved = snapshot(cache)
    for _ in range(2):
        model(ids.flip(0)[:, 9:17], attention_mask=mask[:, :17], past_key_values=cache)
        restore(cache, saved)
    cache.activate_past_recording()
    # two of these are right, three are not
    draft = torch.cat([ids[:, 9:11], ids[:, 9:12] * 0], 1)
    model(draft[:, :4], attention_mask=mask[:, :13], past_key_values=cache)
    model(draft[:, 4:], attention_mask=mask[:, :14], past_key_values=cache)
    cache.crop(-3)
    out = model(ids[:, 11:], attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(out, expected[:, 11:])
