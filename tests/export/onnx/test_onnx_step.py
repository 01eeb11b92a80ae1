from __future__ import annotations

import onnx
import pytest
import torch

import reroll
from reroll.errors import ExportError
from reroll.export.onnx import Onnx
from reroll.export.onnx.emit.scheduler import DepthScheduler
from tests.captured import captured

# states of fixed size, and nothing that differs from round to round
LIGER = "linearize(mixer=gla, gates=liger, combine=sum, window=6, sinks=2)"


@pytest.mark.parametrize(
    ("blocks", "passes"),
    [
        (1, "tie(blocks=1), relax(rank=4)"),
        (2, "tie(blocks=2), relax(rank=4)"),
        (2, f"tie(blocks=2), {LIGER}"),
    ],
)
def test_rows_at_different_depths_share_a_batch(blocks, passes, tmp_path):
    program = reroll.run_passes(captured("llama"), passes, measure=False)
    found = Onnx(graphs=("step", "unrolled")).write(program, tmp_path)
    for name in ("embed", "step", "head"):
        onnx.checker.check_model(str(tmp_path / f"{name}.onnx"), full_check=True)
    assert found["weights"]["bytes"] < 1.1 * 4 * program.parameters() + 4096 * 40
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 64, (n,), generator=generator).tolist() for n in (5, 9, 3, 7)]
    rounds = 4 // blocks
    host = DepthScheduler(tmp_path, rounds)
    rows = []
    for prompt in prompts:
        # one comes in the middle of the others' rounds
        rows.append(host.submit(prompt, 6))
        host.tick()
    while any(row.left for row in rows):
        host.tick()
    assert max(host.batches) == 4
    module = program.to_module().eval()
    for prompt, row in zip(prompts, rows, strict=True):
        expected = module.generate(
            torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None
        )
        assert row.made == expected[0, len(prompt) :].tolist()


def test_trips_that_are_no_rounds_are_refused(tmp_path):
    program = reroll.run_passes(
        captured("llama"), "tie(blocks=3, layout=middle_cycle)", measure=False
    )
    with pytest.raises(ExportError, match="not rounds of one cycle"):
        Onnx(graphs=("step",)).write(program, tmp_path)


def test_a_weight_by_rows_in_an_op_that_knows_no_rows_is_refused(tmp_path):
    passes = "tie(blocks=2), linearize(mixer=gated_deltanet, window=6, sinks=2)"
    program = reroll.run_passes(captured("llama"), passes, measure=False)
    with pytest.raises(ExportError, match="differs from round to round") as error:
        Onnx(graphs=("step",)).write(program, tmp_path)
    assert "mixer" in str(error.value)
