"""A model that an earlier version saved opens, computes what it did, and is rewritten further.

`tests/corpus/saved/november` is a random Llama of four layers, tied, relaxed, linearized and given
an exit by the version of commit f301af0, with the logits and greedy tokens of that version.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import reroll
from reroll.rewrite.analysis.tolerances import forward, relative_rms

SAVED = Path(__file__).parents[2] / "corpus" / "saved" / "november"
IDS = torch.arange(3, 27)[None]


@pytest.fixture(params=["reroll.load", "from_pretrained"])
def model(request):
    if request.param == "reroll.load":
        return reroll.load(SAVED).to_module().eval()
    return AutoModelForCausalLM.from_pretrained(SAVED).eval()


def test_it_computes_what_it_did(model):
    expected = load_file(SAVED / "expected.safetensors")
    with torch.no_grad():
        logits = model(IDS, use_cache=False).logits
        tokens = model.generate(
            IDS[:, :8], max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    assert relative_rms(logits, expected["logits"]) <= forward(torch.float32)
    assert torch.equal(tokens, expected["tokens"])


def test_it_can_be_rewritten_and_saved_again(tmp_path):
    program = reroll.load(SAVED)
    assert [step.text.split("(")[0] for step in program.origin.steps] == [
        "tie", "relax", "linearize", "insert_exits",
    ]  # fmt: skip
    again = reroll.run_passes(program, "fold_norms", measure=False)
    again.save(str(tmp_path / "out"))
    assert reroll.load(tmp_path / "out").origin.steps[-1].text.startswith("fold_norms")
