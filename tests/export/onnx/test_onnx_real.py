"""Exports of the pretrained models that `make models` puts under `models/`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

import reroll
from reroll.export.onnx import Onnx
from reroll.export.onnx.emit.check import prompts
from reroll.export.onnx.emit.session import Session
from reroll.rewrite.analysis import tolerances
from reroll.rewrite.ir.program import Program
from tests.export.onnx.prompted import inputs

LINEAR = "linearize(mixer=gated_deltanet, window=64, sinks=4, keep=6, gain=0.5)"
TIED = "tie(blocks=10), relax(rank=16)"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("name", "passes"),
    [
        ("smollm2-135m-instruct", ""),
        ("smollm2-135m-instruct", TIED),
        ("smollm2-135m-instruct", LINEAR),
        ("gemma-3-270m", ""),
        ("dinov2-small", ""),
    ],
)
def test_exports_are_exact(real_model, tmp_path, name, passes):
    program = reroll.capture(str(real_model(name)), dtype=torch.float32)
    program = reroll.run_passes(program, passes, measure=False)
    found = Onnx(check=True).write(program, tmp_path)
    for graph in found["graphs"].values():
        assert graph["check"]["relative_rms_error"] < 2e-5


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("criterion", ["latent, threshold=-0.35", "margin, threshold=0.2"])
def test_tokens_leave_after_the_same_trips(criterion, real_model, tmp_path):
    program = reroll.capture(str(real_model("smollm2-135m-instruct")), dtype=torch.float32)
    passes = f"{TIED}, insert_exits(at=[10, 20], criterion={criterion})"
    program = reroll.run_passes(program, passes, measure=False)
    # the check compares the depth of every token as well
    found = Onnx(check=True).write(program, tmp_path)
    for graph in found["graphs"].values():
        assert graph["check"]["relative_rms_error"] < 2e-5
    assert len(depths(program, tmp_path / "loop.onnx")) > 1


def depths(program: Program, graph: Path) -> set[int]:
    """After how many trips the tokens of a few prompts leave."""
    ids, seen = prompts(program)
    session = Session(graph)
    session.reset(len(ids))
    return set(session.run(inputs(ids, seen))["depth"][seen.bool()].tolist())


def test_minilm_is_exact(real_model, tmp_path):
    program = reroll.capture(str(real_model("minilm-l6-v2")))
    Onnx(check=True).write(program, tmp_path)


def test_the_encoder_of_whisper_is_that_of_transformers(real_model, tmp_path):
    path = real_model("whisper-tiny.en")
    program = reroll.capture(str(path))
    Onnx(graphs=("loop",)).write(program, tmp_path)
    model = transformers.WhisperForConditionalGeneration.from_pretrained(path).eval()
    sound = torch.randn(1, 80, 3000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.get_encoder()(sound).last_hidden_state
    actual = Session(tmp_path / "loop.onnx").run({"input_features": sound})["last_hidden_state"]
    assert tolerances.relative_rms(actual, expected) < 1e-5


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_onnxruntime_genai_generates_the_same(real_model, tmp_path):
    genai = pytest.importorskip("onnxruntime_genai")
    path = real_model("smollm2-135m-instruct")
    Onnx(graphs=("unrolled",)).write(reroll.capture(str(path)), tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    ids = tokenizer("The history of the bicycle begins in", return_tensors="pt").input_ids
    # the graphs compute in fp32 whatever the checkpoint holds
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model.generate(ids, max_new_tokens=40, do_sample=False)[0].tolist()
    exported = genai.Model(str(tmp_path))
    parameters = genai.GeneratorParams(exported)
    parameters.set_search_options(max_length=len(expected))
    generator = genai.Generator(exported, parameters)
    generator.append_tokens(ids[0].tolist())
    while not generator.is_done():
        generator.generate_next_token()
    assert list(generator.get_sequence(0)) == expected
