"""Models that bring their own Python code: run when it is trusted, by every command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import reroll
from reroll.errors import UsageError
from reroll.evaluate.subjects import Opening, open_original
from tests import custom_code, tiny
from tests.test_cli import data, refused, run

TRUST = "--trust-remote-code"
RECIPE = "recover: {length: 16, batch: 2, held_rows: 1, stages: [{distil: {train: all}}]}\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return custom_code.directory(tmp_path_factory.mktemp("custom") / "loom")


@pytest.fixture(scope="module")
def out(model: Path) -> Path:
    path = model.parent / "out"
    result = run("convert", model, path, TRUST)
    assert result.exit_code == 0, result.stderr
    return path


def test_without_trust_the_refusal_says_what_to_give(model, tmp_path):
    for command in (["convert", model, tmp_path / "out"], ["generate", model, "--prompt", "a"]):
        assert TRUST in refused(*command)
    with pytest.raises(UsageError, match="trust_remote_code=True"):
        reroll.capture(str(model))


def test_what_takes_tokens_and_gives_logits_generates_whatever_its_class_is_called(model):
    program = reroll.capture(str(model), trust_remote_code=True)
    assert program.origin.auto_class == "AutoModelForCausalLM"
    assert [(loop.trips, loop.period) for loop in program.loops] == [(4, 1)]
    ids = torch.tensor([[0, 0, 5, 6, 7], [9, 8, 7, 6, 5]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    wish = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = custom_code.original(model).generate(ids, **wish)
    assert torch.equal(program.to_module().generate(ids, **wish), expected)


def test_an_object_of_a_class_in_no_table_generates(model):
    made = custom_code.original(model)
    del made.config.auto_map
    assert reroll.capture(made).origin.auto_class == "AutoModelForCausalLM"


def test_a_saved_model_holds_no_code_and_loads_without_trust(model, out):
    assert not list(out.rglob("*.py"))
    assert "auto_map" not in json.loads((out / "config.json").read_text())
    script = (
        "import reroll, sys, torch; from transformers import AutoModelForCausalLM as A, "
        "AutoTokenizer as T; m = A.from_pretrained(sys.argv[1]); T.from_pretrained(sys.argv[1]); "
        "print(m(torch.tensor([[5, 6, 7]])).logits.argmax(-1).tolist())"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(out)], capture_output=True, text=True, check=True
    )
    expected = custom_code.original(model)(torch.tensor([[5, 6, 7]])).logits.argmax(-1)
    assert json.loads(result.stdout.splitlines()[-1]) == expected.tolist()


@pytest.mark.slow
def test_every_command_runs_trusted_code(model, out, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("One two three four five. " * 40)
    assert data("inspect", model, TRUST)["captured_exactly"]
    options = [TRUST, "--text", text, "--length", 16, "--max-tokens", 64]
    assert data("compare", model, out, *options)["top1_agreement"] == 1.0
    made = [data("generate", m, TRUST, "--prompt", "a b", "--max-new-tokens", 4)["outputs"]
            for m in (model, out)]  # fmt: skip
    assert made[0] == made[1]
    measures = "perplexity(contexts=[16], tokens=64)"
    found = data("evaluate", model, TRUST, "--measures", measures, "--text", text)
    assert found["measures"]["perplexity"]["status"] == "done"
    assert "loom" in run("show", model, TRUST).stdout
    assert run("diff", model, out, TRUST).exit_code in (0, 1)


@pytest.mark.slow
def test_export_sample_and_recover_run_trusted_code(model, out, tmp_path):
    exported = run("export", model, tmp_path / "onnx", TRUST)
    assert exported.exit_code == 0, exported.stderr
    texts = tmp_path / "texts.jsonl"
    assert TRUST in refused("sample", model, texts, "--tokens", "64")
    made = run("sample", model, texts, "--tokens", "256", "--length", "32", "--batch", "4", TRUST)
    assert made.exit_code == 0, made.stderr
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    command = ["recover", out, tmp_path / "recovered", "--data", texts, "--recipe", recipe,
               "--tokens", "32"]  # fmt: skip
    assert TRUST in refused(*command)
    recovered = run(*command, TRUST)
    assert recovered.exit_code == 0, recovered.stderr
    AutoModelForCausalLM.from_pretrained(tmp_path / "recovered")


def test_trusted_code_is_preferred_to_a_class_of_the_same_name(tmp_path):
    path = custom_code.directory(tmp_path / "same")
    code = (path / "modeling_loom.py").read_text().replace("class Loom(", "class LlamaForCausalLM(")
    (path / "modeling_loom.py").write_text(code)
    config = json.loads((path / "config.json").read_text())
    config["architectures"] = ["LlamaForCausalLM"]
    config["auto_map"] = {
        "AutoConfig": "configuration_loom.LoomConfig",
        "AutoModelForCausalLM": "modeling_loom.LlamaForCausalLM",
    }
    (path / "config.json").write_text(json.dumps(config))
    program = reroll.capture(str(path), trust_remote_code=True)
    assert "threads" in str(program)
    opened = open_original(str(path), Opening(trust_remote_code=True), "LlamaForCausalLM")
    assert hasattr(opened, "threads")


def test_known_architectures_run_without_their_code_and_say_so(tmp_path):
    path = tiny.save(tiny.llama(), tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    config["architectures"] = ["MyLlama"]
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_mine.MyLlama"}
    (path / "config.json").write_text(json.dumps(config))
    program = reroll.capture(str(path), roll=False)
    assert program.origin.architecture == "LlamaForCausalLM"
    assert "MyLlama" in program.origin.remarks[0]
