"""What is written beside the graphs for those who run them: genai_config.json and README.md."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import reroll
from reroll.export.onnx import Onnx
from reroll.rewrite.ir.program import Program
from tests.captured import captured
from tests.export.onnx.test_onnx_recurrence import linearized

PROMPT = [3, 7, 9, 11, 5]
WINDOW = "window=6, sinks=2"


def generated(directory: Path, length: int) -> list[int]:
    """The prompt and what onnxruntime-genai makes of it."""
    genai = pytest.importorskip("onnxruntime_genai")
    model = genai.Model(str(directory))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=length)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(PROMPT)
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)]


@pytest.mark.parametrize(
    ("passes", "runtime", "shares"),
    [
        ("", "any", False),
        ("tie(blocks=2)", "ort", True),
        ("linearize(mixer=gla, window=0, sinks=0)", "any", False),
        ("linearize(mixer=gated_deltanet, window=0, sinks=0, layers=[1, 2])", "ort", True),
        ("linearize(mixer=rwkv6, window=0, sinks=0)", "any", False),
    ],
)
def test_onnxruntime_genai_generates_the_same(passes, runtime, shares, tmp_path):
    program = reroll.run_passes(captured("llama"), passes, measure=False)
    Onnx(graphs=("unrolled",), runtime=runtime).write(program, tmp_path)
    config = json.loads((tmp_path / "genai_config.json").read_text())
    assert config["search"]["past_present_share_buffer"] == shares
    expected = (
        program.to_module()
        .eval()
        .generate(torch.tensor([PROMPT]), max_new_tokens=25, do_sample=False)[0]
        .tolist()
    )
    assert generated(tmp_path, len(expected)) == expected


@pytest.mark.parametrize("options", [f"mixer=gla, {WINDOW}", "mixer=gsa, window=0, sinks=0"])
def test_states_that_genai_does_not_know_get_no_config(options, tmp_path):
    Onnx(graphs=("unrolled",)).write(linearized(options), tmp_path)
    assert not (tmp_path / "genai_config.json").exists()
    assert "onnxruntime-genai does not know" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("options", [None, f"mixer=gated_deltanet, {WINDOW}"])
def test_the_readme_runs(options, tmp_path, monkeypatch, capsys):
    program: Program = captured("llama") if options is None else linearized(options)
    Onnx().write(program, tmp_path)
    code = re.findall(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.S)[0]
    code = re.sub(r"tokens = .*", f"tokens = np.array([{PROMPT}])", code, count=1)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    made = [int(word) for word in re.findall(r"\d+", capsys.readouterr().out)]
    expected = program.to_module().eval().generate(
        torch.tensor([PROMPT]), max_new_tokens=20, do_sample=False, eos_token_id=None
    )  # fmt: skip
    assert made == expected[0, len(PROMPT) :].tolist()
