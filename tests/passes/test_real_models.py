"""The passes on real models, which `make models` puts under `models/`."""

from __future__ import annotations

import pytest
import torch

from reroll.rewrite.analysis import tolerances
from reroll.rewrite.capture.export import capture
from reroll.rewrite.ir.interpret import run
from reroll.rewrite.ir.text.compare import same
from reroll.rewrite.pipeline.manager import run_passes
from tests.passes.test_fold_norms import LAYER_NORM, nodes

pytestmark = pytest.mark.slow


def test_smollm2_tied_and_fully_relaxed_is_smollm2(real_model):
    program = capture(str(real_model("smollm2-135m-instruct")))
    result = run_passes(program, "tie(blocks=10), relax(rank=full)", measure=False)
    assert same(result, program)


def test_smollm2_is_nearer_to_itself_with_every_rank(real_model):
    program = capture(str(real_model("smollm2-135m-instruct")), dtype=torch.float32)
    parameters, kl = [], []
    for rank in (144, 512):
        step = run_passes(program, f"tie(blocks=15, layout=sequence), relax(rank={rank})")
        quality = step.origin.steps[-1].measured["quality"]["original"]
        assert quality["inputs"] == "text"
        kl.append(quality["kl"])
        parameters.append(step.parameters())
    assert kl == sorted(kl, reverse=True)
    layer = 2 * 576 * 576 + 2 * 192 * 576 + 3 * 576 * 1536
    inout = 2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536)
    assert parameters[0] == program.parameters() - 15 * layer + 30 * 144 * inout


@pytest.mark.parametrize("name", ["dinov2-small", "whisper-tiny.en"])
def test_real_layer_norms_are_folded_exactly(real_model, name):
    program = capture(str(real_model(name)), dtype=torch.float32)
    result = run_passes(program, "fold_norms")
    assert not nodes(result, LAYER_NORM)
    assert result.origin.steps[-1].measured["relative_rms_error"] <= tolerances.forward(
        torch.float32
    )


@pytest.mark.parametrize(
    "options",
    [
        "criterion=margin, head=own",
        "criterion=gated, state=skip, head=norm",
        "criterion=saturation, state=defer",
    ],
)
def test_smollm2_with_exits_that_nobody_takes_is_smollm2(real_model, options):
    program = capture(str(real_model("smollm2-135m-instruct")), dtype=torch.float32)
    result = run_passes(program, f"insert_exits(at=[10, 20], {options})", measure=False)
    ids = torch.arange(24)[None] * 97 % 49152
    found, expected = run(result, {"input_ids": ids}), run(program, {"input_ids": ids})
    error = tolerances.relative_rms(found["logits"], expected["logits"])
    assert error <= tolerances.forward(torch.float32)
    assert found["depth"].eq(30).all()
