"""What `inspect_model` says about models whose structure is known."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

import reroll
from reroll.errors import RerollError, UsageError
from reroll.evaluate.inspect import attention_kinds, check_capture, inspect_model
from reroll.rewrite.analysis import tolerances
from reroll.rewrite.capture.export import capture
from reroll.rewrite.capture.raising.driver import raise_idioms
from reroll.rewrite.capture.rolling.roll import roll_loops
from reroll.rewrite.ir.weights import Weight, scale
from tests import tiny
from tests.real import stored_dtype

pytestmark = pytest.mark.usefixtures("captured_once")

REQUIRED = {
    "model", "parameters", "loops", "attention", "captured_exactly", "max_abs_logit_error",
}  # fmt: skip
LOOP = {"trips", "period", "layers", "body_ops", "carried", "invariants"}
ATTENTION = {"causal", "window", "kv_heads", "heads", "count"}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return inspect_model(tiny.llama(layers=5))


def test_keys_of_the_public_interface(found: dict[str, Any]) -> None:
    assert set(found) >= REQUIRED
    assert all(set(loop) >= LOOP for loop in found["loops"])
    assert all(set(kind) >= ATTENTION for kind in found["attention"])
    json.dumps(found, allow_nan=False)


def test_finds_the_layers(found: dict[str, Any]) -> None:
    (loop,) = found["loops"]
    assert (loop["trips"], loop["period"], loop["layers"], loop["carried"]) == (5, 1, 5, 1)
    assert loop["body_ops"] == sum(loop["ops"].values())
    (kind,) = found["attention"]
    assert kind["causal"] is True
    assert (kind["window"], kind["heads"], kind["kv_heads"], kind["count"]) == (None, 4, 2, 5)
    assert found["parameters"] == sum(p.numel() for p in tiny.llama(layers=5).parameters())


def test_capture_is_exact(found: dict[str, Any]) -> None:
    assert found["captured_exactly"] is True
    assert found["max_abs_logit_error"] == 0
    assert found["check"]["rolled"]["relative_rms_error"] <= 1e-6


def test_counts_the_windows_of_each_trip() -> None:
    config = Gemma2Config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=100,
        sliding_window=8,
    )
    found = inspect_model(Gemma2ForCausalLM(config).eval())
    assert {kind["window"]: kind["count"] for kind in found["attention"]} == {8: 2, None: 2}
    assert found["captured_exactly"] is True


def test_encoders_have_no_logits() -> None:
    found = inspect_model(tiny.bert())
    assert found["captured_exactly"] is True
    assert found["max_abs_logit_error"] is None
    assert found["output"] == "last_hidden_state"
    assert found["attention"][0]["causal"] is False


def test_without_a_check_nothing_is_claimed() -> None:
    found = inspect_model(tiny.llama(), check=False)
    assert found["captured_exactly"] is None
    assert found["max_abs_logit_error"] is None


def test_a_directory_and_what_it_was_converted_to(tmp_path: Path) -> None:
    path = tiny.save(tiny.llama(), tmp_path / "model")
    found = inspect_model(str(path))
    assert found["model"] == str(path)
    assert found["captured_exactly"] is True
    program = reroll.run_passes(reroll.capture(str(path)), "tie(blocks=2)", measure=False)
    program.save(str(tmp_path / "out"))
    converted = inspect_model(str(tmp_path / "out"))
    assert converted["passes"] == ["tie(blocks=2)"]
    assert converted["captured_exactly"] is None
    assert converted["parameters"] < found["parameters"]


def test_the_model_is_left_as_it_was() -> None:
    model = tiny.llama().train()
    before = model.config._attn_implementation
    inspect_model(model)
    assert model.training
    assert model.config._attn_implementation == before


def test_a_wrong_capture_is_seen() -> None:
    model = tiny.llama()
    flat = capture(model, roll=False)
    weight = flat.weights["model.norm.weight"]
    # one part in a thousand
    changed = Weight((scale(weight.entries[0], 1.001),), weight.index, weight.trainable)
    wrong = replace(flat, weights=flat.weights.with_weight("model.norm.weight", changed))
    errors = check_capture(model, wrong, flat)
    assert errors["flat"]["bit_identical"] is False
    assert errors["flat"]["relative_rms_error"] == pytest.approx(1e-3, rel=0.01)
    assert errors["rolled"]["bit_identical"] is True


def test_a_capture_that_holds_only_for_its_own_sizes_is_seen() -> None:
    model = tiny.llama()
    flat = capture(model, roll=False).edit()
    (logits,) = flat.graph.output_node().args[0]
    with flat.graph.inserting_before(flat.graph.output_node()):
        fixed = flat.graph.call_function(torch.ops.aten.narrow.default, (logits, 1, 0, 17))
    flat.graph.output_node().args = ((fixed,),)
    errors = check_capture(model, flat, flat)
    assert errors["flat"]["bit_identical"] is False
    assert "narrow" in errors["flat"]["failure"]


def test_attention_is_the_same_before_rolling() -> None:
    raised = raise_idioms(capture(tiny.llama(), roll=False))
    assert attention_kinds(raised) == attention_kinds(roll_loops(raised))


def test_refuses_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        inspect_model(capture(tiny.llama(), roll=False))
    with pytest.raises(RerollError):
        inspect_model(str(tmp_path))
    with pytest.raises(RerollError):
        inspect_model("/no/such/model")


@pytest.mark.slow
def test_smollm2(real_model: Callable[[str], Path]) -> None:
    path = real_model("smollm2-135m-instruct")
    found = inspect_model(str(path))
    assert found["captured_exactly"] is True
    assert [loop["layers"] for loop in found["loops"]] == [30]
    assert found["parameters"] == 134_515_008
    # roundings of bf16 add up over thirty layers; tests/test_real_models.py has them beside those
    # of the original
    if stored_dtype(path) != torch.float32:
        found = inspect_model(str(path), dtype="float32")
    assert found["check"]["rolled"]["relative_rms_error"] <= tolerances.ROLLED[torch.float32]
