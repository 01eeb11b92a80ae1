"""`from_pretrained` of what reroll saved: dtypes, devices, options, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import reroll
from reroll.errors import CheckpointError, ProgramError, RerollError, UsageError
from reroll.rewrite.ir.dtypes import retype
from reroll.runtime.models.auto import register_models
from reroll.runtime.models.config import RerollConfig
from tests import captured

IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "llama"
    captured.captured("llama").save(str(path))
    return path


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "half"
    captured.captured("llama", torch.bfloat16).save(str(path))
    return path


def load(path: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(str(path), **options)


def test_auto_classes_know_it_in_a_fresh_process(saved: Path) -> None:
    code = (
        "import sys, reroll\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "from transformers import AutoConfig, AutoModelForCausalLM\n"
        f"print(AutoConfig.from_pretrained({str(saved)!r}).original_model_type)\n"
        f"print(type(AutoModelForCausalLM.from_pretrained({str(saved)!r})).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["llama", "RerollForCausalLM"], done.stderr[-2000:]


def test_a_program_in_half_precision_runs_in_its_own_dtype_and_in_fp32(half: Path) -> None:
    own, wide = load(half), load(half, dtype=torch.float32)
    assert {own.dtype, load(half, dtype="auto").dtype} == {torch.bfloat16}
    assert wide.dtype == torch.float32
    assert wide.config.dtype == torch.float32
    original = captured.model("llama", torch.bfloat16)
    expected = original(IDS).logits
    torch.testing.assert_close(own(IDS).logits, expected, rtol=2e-2, atol=2e-2)
    # fp32 arithmetic on the same weights
    exact = captured.model("llama").__class__(original.config).eval()
    exact.load_state_dict({k: v.float() for k, v in original.state_dict().items()})
    exact = exact.float()
    torch.testing.assert_close(wide(IDS).logits, exact(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "dtype", "reason"),
    [
        # these were not captured in a second dtype
        ("saved", "bfloat16", "does not run in"),
        ("saved", torch.float16, "does not run in"),
        ("half", "float16", "does not run in"),
        ("half", "complex", "no dtype to compute in"),
        ("half", torch.float64, "no dtype to compute in"),
    ],
)
def test_another_dtype_is_refused(request: Any, name: str, dtype: Any, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        load(request.getfixturevalue(name), dtype=dtype)


def test_widening_leaves_the_program_alone() -> None:
    program = captured.captured("llama", torch.bfloat16)
    before = str(program)
    assert retype(program, torch.float32).dtype == torch.float32
    assert str(program) == before
    assert retype(program, None) is program


def test_options_change_the_configuration(saved: Path) -> None:
    model = load(saved, use_cache=False, output_hidden_states=True)
    out = model(IDS)
    assert out.past_key_values is None
    assert len(out.hidden_states) == 5


def test_loading_info(saved: Path) -> None:
    _, info = load(saved, output_loading_info=True)
    assert not any(info.values())


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), {"": "cpu"}, "auto"])
def test_a_device_map_is_one_device(saved: Path, device: Any) -> None:
    assert load(saved, device_map=device).device.type in ("cpu", "cuda")


@pytest.mark.parametrize(
    "options",
    [
        {"device_map": "evenly"},
        {"device_map": {"model": "cpu", "lm_head": "cuda:0"}},
        {"quantization_config": {"load_in_8bit": True}},
        {"no_such_option": 1},
    ],
)
def test_what_it_cannot_do_is_said(saved: Path, options: dict[str, Any]) -> None:
    with pytest.raises((UsageError, ValueError)):
        load(saved, **options)


@pytest.mark.parametrize(
    "options", [{"num_hidden_layers": 2}, {"rms_norm_eps": 0.1}, {"hidden_act": "relu"}]
)
def test_what_has_become_the_graph_cannot_be_changed(saved: Path, options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(UsageError, match=f"{name} is part of the program"):
        load(saved, **options)
    config = transformers.AutoConfig.from_pretrained(saved)
    assert load(saved, config=config, **{name: getattr(config, name)}) is not None
    setattr(config, name, options[name])
    with pytest.raises(UsageError, match=f"{name} is part of the program"):
        load(saved, config=config)


def test_what_is_read_when_it_runs_can_be_changed(saved: Path) -> None:
    model = load(saved, use_cache=False, pad_token_id=5, output_hidden_states=True)
    assert (model.config.use_cache, model.config.pad_token_id) == (False, 5)
    assert model(torch.tensor([[1, 2, 3]])).hidden_states is not None


def test_the_wrong_auto_class_names_the_right_one(saved: Path) -> None:
    with pytest.raises(UsageError, match=r"use AutoModelForCausalLM\.from_pretrained"):
        transformers.AutoModelForMaskedLM.from_pretrained(str(saved))


def test_none_asks_for_nothing(saved: Path) -> None:
    # lm-eval passes these to every model
    model = load(saved, gguf_file=None, quantization_config=None, subfolder="", revision="main")
    assert type(model).__name__ == "RerollForCausalLM"


def test_generation_settings_come_from_the_original(tmp_path: Path) -> None:
    original = captured.model("t5")
    captured.captured("t5").save(str(tmp_path / "t5"))
    again = transformers.AutoModelForSeq2SeqLM.from_pretrained(str(tmp_path / "t5"))
    for name in ("decoder_start_token_id", "eos_token_id", "pad_token_id"):
        expected = getattr(original.generation_config, name)
        assert getattr(again.generation_config, name) == expected


@pytest.mark.parametrize(
    "name", ["../program.json", "/etc/passwd", "program.json/..", "a/b.json", "", None, 3]
)
def test_the_program_is_a_file_beside_its_configuration(tmp_path: Path, name: Any) -> None:
    captured.captured("llama").save(str(tmp_path / "out"))
    file = tmp_path / "out" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "program_file": name}))
    (tmp_path / "program.json").write_text("{}")
    with pytest.raises((CheckpointError, UsageError), match="file beside it"):
        reroll.load(tmp_path / "out")


@pytest.mark.parametrize("name", ["../stolen", "/etc/passwd", "a/../../b", "a\\b", ".", ""])
def test_side_files_stay_in_the_directory(tmp_path: Path, name: str) -> None:
    captured.captured("llama").save(str(tmp_path / "out"))
    file = tmp_path / "out" / "program.json"
    data = json.loads(file.read_text())
    data["origin"]["files"] = {name: "x"}
    file.write_text(json.dumps(data))
    with pytest.raises(ProgramError):
        reroll.load(tmp_path / "out")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("reroll.rms_norm", "os.system"),
        ("reroll.rms_norm", "aten.save"),
        ("aten.linear", "aten.linear.__call__"),
        ("reroll.glu", "builtins.exec"),
    ],
)
def test_only_ops_are_called(tmp_path: Path, old: str, new: str) -> None:
    captured.captured("llama").save(str(tmp_path / "out"))
    file = tmp_path / "out" / "program.json"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(RerollError):
        load(tmp_path / "out")


def test_a_directory_that_is_not_ours(tmp_path: Path) -> None:
    captured.model("llama").save_pretrained(str(tmp_path))
    from reroll.rewrite.checkpoint.saved import load_program

    with pytest.raises(UsageError, match="did not save"):
        load_program(tmp_path)
    with pytest.raises(UsageError, match=r"no config\.json"):
        load_program(tmp_path / "nothing")


def test_a_configuration_that_is_not_its_own_is_refused(saved: Path) -> None:
    with pytest.raises(UsageError, match="is a RerollConfig, not LlamaConfig"):
        type(load(saved)).from_pretrained(str(saved), config=transformers.LlamaConfig())
    config = transformers.AutoConfig.from_pretrained(saved)
    assert load(saved, config=config).config is config
    tied = config.tie_word_embeddings
    with pytest.raises(UsageError, match="tie_word_embeddings is part of the program"):
        load(saved, tie_word_embeddings=not tied)
    assert load(saved, tie_word_embeddings=tied).config.tie_word_embeddings == tied


def test_a_configuration_names_its_directory(saved: Path) -> None:
    loaded = load(saved)
    weights = {name: tensor + 1 for name, tensor in loaded.state_dict().items()}
    again = type(loaded).from_pretrained(None, config=loaded.config, state_dict=weights)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in again.state_dict().items())
    with pytest.raises(UsageError, match="none is named"):
        type(loaded).from_pretrained(None, config=captured.captured("llama").to_module().config)


def test_attention_is_not_said_to_be_set(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    loaded = load(saved)
    before = loaded(IDS).logits
    loaded.set_attn_implementation("eager")
    assert "does not support setting its attention implementation" in caplog.text
    assert torch.equal(loaded(IDS).logits, before)


def test_a_model_type_is_not_taken_for_an_encoder_decoder() -> None:
    """lm-eval looks for the type among encoder-decoders first; Trainer looks for class names."""
    from transformers.models.auto import modeling_auto

    register_models(RerollConfig)
    encoder_decoders = modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    assert "reroll" in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    assert "reroll" not in encoder_decoders
    assert "RerollForSeq2SeqLM" in encoder_decoders.values()


def test_it_is_captured_again_with_its_present_weights(saved: Path) -> None:
    model = load(saved)
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    program = reroll.capture(model)
    assert str(program) == str(reroll.capture(saved))
    assert torch.equal(program.to_module()(IDS).logits, model(IDS).logits)
    assert not torch.equal(reroll.load(saved).to_module()(IDS).logits, model(IDS).logits)
