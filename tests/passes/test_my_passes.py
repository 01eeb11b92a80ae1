from __future__ import annotations

from pathlib import Path

import pytest
import torch

from reroll.rewrite.ir.interpret import materialise
from reroll.rewrite.ir.text.parser import parse
from reroll.rewrite.pipeline import registry
from reroll.rewrite.pipeline.base import PASSES
from reroll.rewrite.pipeline.manager import run_passes
from tests.captured import captured
from tests.conformance.pass_suite import PassSuite

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "my_passes.py"


@pytest.fixture(scope="module", autouse=True)
def loaded():
    """The example, loaded as `--load` does, and forgotten afterwards."""
    patch = pytest.MonkeyPatch()
    patch.setattr(PASSES, "classes", PASSES.all())
    yield registry.load_file(EXAMPLE)
    patch.undo()


class TestPrune(PassSuite):
    pipeline = "prune(keep=0.9)"


@pytest.mark.parametrize("keep", [0.0, 0.25, 1.0])
def test_it_keeps_what_it_says(keep):
    program = run_passes(captured("llama"), f"prune(keep={keep})")
    before, after = materialise(captured("llama")), materialise(program)
    for key, tensor in after.items():
        if program.weights[key[0]].index is None or tensor.dim() < 2:
            assert tensor.equal(before[key])
        else:
            assert tensor.count_nonzero().item() == round(keep * tensor.numel())
            assert ((tensor == before[key]) | (tensor == 0)).all()


def test_it_goes_together_with_other_passes():
    program = run_passes(captured("llama"), "prune, tie(blocks=2), relax(rank=full)", measure=False)
    assert [step.text for step in program.origin.steps] == [
        "prune",
        "tie(blocks=2)",
        "relax(rank=full)",
    ]
    assert parse(str(program)).weights == program.weights
    assert torch.equal(
        materialise(program)["model.layers.*.mlp.up_proj.weight", 3],
        materialise(run_passes(captured("llama"), "prune"))["model.layers.*.mlp.up_proj.weight", 3],
    )


def test_the_documentation_shows_the_example_as_it_is():
    example = EXAMPLE.read_text(encoding="utf-8")
    assert len(example.splitlines()) < 40
    assert f"```python\n{example}```" in (ROOT / "docs" / "passes.md").read_text(encoding="utf-8")


def test_the_documentation_names_every_kind_of_option():
    text = (ROOT / "docs" / "passes.md").read_text(encoding="utf-8")
    assert "print_after" in text
    for contract in ('"exact"', '"approximate"'):
        assert contract in text
