"""The examples do what the guides say, loaded as a user loads them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

import reroll
from reroll.cli.app import app
from reroll.evaluate.measure import find as find_measure
from reroll.export.targets import find as find_target
from reroll.mixers import make
from reroll.recover.stage import Batch, Models
from reroll.recover.stage import find as find_stage
from reroll.rewrite.analysis.samples import sample_text
from reroll.rewrite.ir.interpret import materialise, run
from reroll.rewrite.ir.types import type_of
from reroll.rewrite.pipeline.manager import run_passes
from reroll.rewrite.pipeline.registry import load_file, registries
from tests import tiny
from tests.captured import captured
from tests.conformance.mixer_suite import MixerSuite, assert_close, draw
from tests.conformance.pass_suite import PassSuite
from tests.conformance.target_suite import TargetSuite
from tests.documents.pages import ROOT, blocks
from tests.evaluate import fakes

pytestmark = pytest.mark.usefixtures("captured_once")

EXAMPLES = {
    "my_passes": "passes",
    "my_mixer": "mixers",
    "my_target": "targets",
    "my_stage": "recover",
    "my_measure": "evaluate",
    "my_op": "ops",
}


def example(name: str) -> Path:
    return ROOT / "examples" / f"{name}.py"


@pytest.fixture(scope="module", autouse=True)
def loaded() -> Iterator[None]:
    """All examples, loaded as `--load` does, and forgotten afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        for registry in registries():
            patch.setattr(registry, "classes", registry.all())
        for name in EXAMPLES:
            load_file(example(name))
        yield


@pytest.mark.parametrize(("name", "page"), EXAMPLES.items())
def test_the_guide_shows_the_example_as_it_is(name: str, page: str) -> None:
    shown = [block.code for block in blocks(ROOT / "docs" / f"{page}.md")]
    assert example(name).read_text(encoding="utf-8") in shown


# ---- conformance


class TestMean(MixerSuite):
    @pytest.fixture(scope="class", autouse=True)
    def under_test(self, loaded: None) -> None:
        type(self).mixer = make("mean")


class TestNumpy(TargetSuite):
    target = "numpy"


class TestCapLogits(PassSuite):
    pipeline = "cap_logits(cap=2)"


# ---- what each computes


def test_the_mean_is_a_mean() -> None:
    inputs = draw(make("mean"))
    out, _ = make("mean").chunk(*inputs[:4])
    weight = inputs.gates[0][..., None]
    expected = (weight * inputs.v).cumsum(2) / weight.cumsum(2)
    # two query heads read each state
    expected = expected.repeat_interleave(2, 1).transpose(1, 2)
    assert_close(out, expected, 1e-12, "the weighted mean")


def test_what_numpy_writes_is_the_weights(tmp_path: Path) -> None:
    program = captured("llama")
    found = find_target("numpy").make({"numbers": "float16"}).write(program, tmp_path)
    weights = materialise(program)
    assert len(found["weights"]) == len(weights)
    for item in found["weights"]:
        tensor = weights[item["weight"], item["entry"]]
        expected = tensor.half().float()
        assert torch.equal(torch.from_numpy(np.load(tmp_path / item["file"])).float(), expected)
    assert reroll.parse((tmp_path / "program.txt").read_text()).weights == program.weights


def test_equal_logits_cost_nothing_and_a_shift_neither() -> None:
    original = captured("llama").to_module()
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids, torch.ones_like(ids))
    stage = find_stage("match_logits").make({})
    assert stage.loss(batch, Models(original, original, original)).value == 0

    class Shifted(torch.nn.Module):
        def forward(self, **inputs: Any) -> Any:
            found = original(**inputs)
            found.logits = found.logits + 3
            return found

    shifted = stage.loss(batch, Models(Shifted(), original, original))
    assert shifted.value < 1e-8
    tied = run_passes(captured("llama"), "tie(blocks=2)", measure=False).to_module()
    loss = stage.loss(batch, Models(tied, tied, original))
    assert loss.value > 0.1
    assert loss.parts["largest"] > 0.3
    loss.value.backward()
    assert next(tied.parameters()).grad is not None


def test_confidence_of_models_that_are_known() -> None:
    measure = find_measure("confidence").make({"context": 64})
    unsure = measure.run(fakes.bench(fakes.uniform()))["model"]
    assert unsure["confidence"] == pytest.approx(1 / tiny.WORDS)
    text = "abc" * 100
    sure = measure.run(fakes.bench(fakes.copier(), text=text))["model"]
    assert sure["confidence"] > 0.8
    assert sure["accuracy"] > 0.8


def test_capped_logits() -> None:
    inputs = {"input_ids": torch.arange(3, 12)[None]}
    before = run(captured("llama"), inputs)["logits"]
    program = run_passes(captured("llama"), "cap_logits(cap=0.5)", measure=False)
    after = run(program, inputs)["logits"]
    assert torch.equal(after, 0.5 * torch.tanh(before / 0.5))
    assert before.abs().max() > 1
    # every node has a type, also the new one
    assert all(type_of(n) for n in program.graph.nodes if "softcap" in n.name)
    # it can be trained through
    model = program.to_module()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: torch.ops.my.softcap(x, 1.5), (x,))


# ---- on the command line


def command(*arguments: object) -> Any:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout) if "--json" in arguments else result.stdout


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    return tiny.save(tiny.llama(), path, tiny.tokenizer(prefix=True))


@pytest.fixture(scope="module")
def text(model: Path) -> Path:
    path = model.parent / "text.txt"
    path.write_text(sample_text(), encoding="utf-8")
    return path


def test_the_mixer_in_a_model(model: Path, tmp_path: Path) -> None:
    load = ("--load", example("my_mixer"))
    passes = "linearize(mixer=mean, window=8)"
    command("convert", model, tmp_path / "out", *load, "--passes", passes)
    assert "recurrence" in command("show", tmp_path / "out", *load)
    command("generate", tmp_path / "out", *load, "--prompt", "a", "--max-new-tokens", 3)


def test_the_target(model: Path, tmp_path: Path) -> None:
    load = ("--load", example("my_target"))
    options = ("--target", "numpy", "--numbers", "float16")
    found = command("export", model, tmp_path / "out", *load, *options, "--json")
    assert found["numbers"] == "float16"
    assert len(found["weights"]) + 1 == len(found["sizes"])


def test_the_stage(model: Path, text: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    settings = {"length": 16, "batch": 4, "held_rows": 4}
    stages = [{"match_logits": {"margin": 0.1, "lr": 3e-3}}]
    recipe.write_text(yaml.safe_dump({"recover": {**settings, "stages": stages}}))
    command("convert", model, tmp_path / "tied", "--passes", "tie(blocks=2)")
    load = ("--load", example("my_stage"), "--recipe", recipe, "--data", text, "--tokens", 1024)
    found = command("recover", tmp_path / "tied", tmp_path / "out", *load, "--json")
    before, after = (line["kl"] for line in found["measures"])
    assert after < before


def test_the_measure(model: Path) -> None:
    load = ("--load", example("my_measure"), "--measures", "confidence(context=64)")
    found = command("evaluate", model, *load, "--json")["measures"]["confidence"]
    assert found["status"] == "done"
    assert set(found["headline"]["model"]) == {
        "probability of the likeliest token", "how often it is right"
    }  # fmt: skip


def test_the_op(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    load = ("--load", example("my_op"))
    command("convert", model, tmp_path / "out", *load, "--passes", "cap_logits(cap=2)")
    assert "my.softcap" in command("show", tmp_path / "out", *load)
    target = ("--target", "onnx", "--graphs", "unrolled", "--check")
    found = command("export", tmp_path / "out", tmp_path / "onnx", *load, *target, "--json")
    check = found["graphs"]["unrolled"]["check"]
    assert check["relative_rms_error"] < check["tolerance"]
