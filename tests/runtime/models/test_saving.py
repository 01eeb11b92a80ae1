"""`save_pretrained` of what was changed in memory: it comes back, or saving refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig

import reroll
from reroll.errors import RerollError, UsageError
from reroll.export import shards
from reroll.rewrite.pipeline.manager import run_passes
from reroll.runtime.models.auto import model_class
from reroll.runtime.models.config import RerollConfig
from tests import captured

pytestmark = pytest.mark.usefixtures("captured_once")

IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))


def lowered(passes: str = "", name: str = "llama") -> Any:
    program = captured.captured(name)
    return (run_passes(program, passes, measure=False) if passes else program).to_module()


def again(model: Any, path: Path, **options: Any) -> Any:
    model.save_pretrained(path, **options)
    return AutoModelForCausalLM.from_pretrained(path)


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **options)


def noisy(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    return model


# ---- adapters


@pytest.mark.parametrize("passes", ["", "tie(blocks=2)"])
def test_an_adapter_of_a_model_in_memory_is_saved_beside_it(tmp_path: Path, passes: str) -> None:
    model = lowered(passes)
    model.add_adapter(lora())
    expected = model(IDS).logits
    found = again(model, tmp_path)
    assert torch.equal(found(IDS).logits, expected)
    assert found.active_adapters() == ["default"]
    with pytest.raises(RerollError, match=r"adapter_config\.json"):
        reroll.capture(tmp_path)


def test_an_adapter_of_a_saved_model_is_saved_alone_as_transformers_does(tmp_path: Path) -> None:
    model = again(lowered(), tmp_path / "base")
    model.add_adapter(lora(modules_to_save=["lm_head"]))
    noisy(model)
    expected = model(IDS).logits
    found = again(model, tmp_path / "adapter")
    names = {p.name for p in (tmp_path / "adapter").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "README.md"} & names
    assert torch.equal(found(IDS).logits, expected)
    direct = type(model).from_pretrained(tmp_path / "adapter")
    assert torch.equal(direct(IDS).logits, expected)


def test_a_model_without_an_adapter_is_not_saved_beside_one(tmp_path: Path) -> None:
    model = lowered()
    model.add_adapter(lora())
    model.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="would change the model"):
        lowered().save_pretrained(tmp_path)


def test_adapters_that_are_not_merged_are_no_program(tmp_path: Path) -> None:
    model = lowered()
    get_peft_model(model, lora())
    for save in (model.to_program, lambda: model.save_pretrained(tmp_path)):
        with pytest.raises(
            UsageError, match=r"layers\.0\.self_attn\.q_proj.*an adapter is no part"
        ):
            save()


# ---- other modules


def other_head(model: Any) -> None:
    model.set_output_embeddings(nn.Linear(32, 64, bias=False))


def other_table(model: Any) -> None:
    model.set_input_embeddings(nn.Embedding(64, 32))


def copied_head(model: Any) -> None:
    noisy(get_peft_model(model, lora(modules_to_save=["lm_head"]))).merge_and_unload()


@pytest.mark.parametrize("change", [other_head, other_table, copied_head])
@pytest.mark.parametrize("passes", ["", "insert_exits(at=[2], criterion=margin)"])
def test_a_replaced_head_is_saved(tmp_path: Path, change: Any, passes: str) -> None:
    model = lowered(passes)
    before = model(IDS).logits
    change(model)
    expected = model(IDS).logits
    assert not torch.equal(expected, before)
    found = again(model, tmp_path)
    assert torch.equal(found(IDS).logits, expected)
    assert found.get_input_embeddings().weight is not found.get_output_embeddings().weight
    third = again(found, tmp_path / "third")
    assert torch.equal(third(IDS).logits, expected)


def with_bias(model: Any) -> None:
    model.set_output_embeddings(nn.Linear(32, 64))


def of_another_kind(model: Any) -> None:
    model.get_submodule("model.layers.1.mlp").up_proj = nn.Sequential(nn.Linear(32, 48, bias=False))


def with_another_forward(model: Any) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model.get_submodule("model.layers.1.mlp").up_proj = Doubled(32, 48, bias=False)


def with_a_parameter_more(model: Any) -> None:
    model.get_submodule("model.layers.1").register_parameter("scale", nn.Parameter(torch.ones(1)))


def of_another_shape(model: Any) -> None:
    model.set_output_embeddings(nn.Linear(32, 65, bias=False))


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (with_bias, "lm_head"),
        (of_another_kind, r"model\.layers\.1\.mlp\.up_proj"),
        (with_another_forward, r"model\.layers\.1\.mlp\.up_proj"),
        (with_a_parameter_more, r"model\.layers\.1: .*scale"),
        (of_another_shape, "lm_head"),
    ],
)
def test_what_the_program_has_no_place_for_is_refused(
    tmp_path: Path, change: Any, where: str
) -> None:
    model = lowered()
    change(model)
    with pytest.raises(RerollError, match=where):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- state dicts


@pytest.mark.parametrize("passes", ["", "tie(blocks=2)"])
def test_a_state_dict_is_what_is_saved(tmp_path: Path, passes: str) -> None:
    model, trained = lowered(passes), noisy(lowered(passes))
    state = {n: t.clone() for n, t in trained.state_dict().items()}
    found = again(model, tmp_path / "whole", state_dict=state)
    assert torch.equal(found(IDS).logits, trained(IDS).logits)
    assert found.num_parameters() == model.num_parameters()
    # as one without the names that are tied
    once = {n: t for n, t in state.items() if n not in model.all_tied_weights_keys}
    assert set(once) < set(state)
    found = again(model, tmp_path / "once", state_dict=once)
    assert torch.equal(found(IDS).logits, trained(IDS).logits)


def test_a_state_dict_that_is_not_the_models_is_refused(tmp_path: Path) -> None:
    model = lowered("tie(blocks=2)")
    state = {n: t.clone() for n, t in model.state_dict().items()}
    compiled = {f"_orig_mod.{n}": t for n, t in state.items()}
    with pytest.raises(UsageError, match="has no tensor of this name"):
        model.save_pretrained(tmp_path, state_dict=compiled)
    more = {**state, "value_head.weight": torch.zeros(1)}
    with pytest.raises(UsageError, match=r"value_head\.weight, which the model does not have"):
        model.save_pretrained(tmp_path, state_dict=more)
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    with pytest.raises(UsageError, match=r"another tensor for lm_head\.weight"):
        model.save_pretrained(tmp_path, state_dict=state)


def test_only_the_main_process_writes_and_nothing_is_pushed(tmp_path: Path) -> None:
    lowered().save_pretrained(tmp_path / "out", is_main_process=False, state_dict={})
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="pushed"):
        lowered().save_pretrained(tmp_path / "out", push_to_hub=True)


def test_weights_of_an_earlier_save_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lowered().save_pretrained(tmp_path)
    trained = noisy(lowered())
    with monkeypatch.context() as patch:
        patch.setattr(shards.save_outputs, "__defaults__", (None, 20_000))
        found = again(trained, tmp_path)
    assert torch.equal(found(IDS).logits, trained(IDS).logits)
    assert not (tmp_path / "model.safetensors").exists()
    assert torch.equal(again(lowered(), tmp_path)(IDS).logits, lowered()(IDS).logits)
    assert [p.name for p in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]


# ---- configurations


def test_edits_of_both_configurations_are_kept(tmp_path: Path) -> None:
    model = lowered()
    model.config.use_cache = False
    model.config.output_hidden_states = True
    model.config.id2label = {0: "no", 1: "yes"}
    model.config.note = "mine"
    model.generation_config.max_new_tokens = 3
    model.generation_config.eos_token_id = [2, 7]
    found = again(model, tmp_path / "a")
    # and through the program, which passes would go on from
    program = reroll.load(tmp_path / "a")
    program.save(str(tmp_path / "b"))
    for each in (found, AutoModelForCausalLM.from_pretrained(tmp_path / "b")):
        assert each.generation_config.max_new_tokens == 3
        assert each.generation_config.eos_token_id == [2, 7]
        assert each.config.note == "mine"
        assert each.config.id2label == {0: "no", 1: "yes"}
        assert not each.config.use_cache
        assert each(IDS).past_key_values is None
    assert found.config.output_hidden_states
    assert found.generate(IDS, do_sample=False).shape[1] <= IDS.shape[1] + 3


@pytest.mark.parametrize("name", ["llama", "gemma3", "t5"])
def test_without_edits_nothing_changes(tmp_path: Path, name: str) -> None:
    program = captured.captured(name)
    program.save(str(tmp_path / "a"))
    model = model_class(program).from_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    for file in ("config.json", "README.md"):
        one, other = ((tmp_path / d / file).read_text() for d in "ab")
        assert one == other
    one, other = (reroll.load(tmp_path / d).origin for d in "ab")
    assert replace(other, files=one.files) == one
    assert [Path(f).name for f in other.files.values()] == [
        Path(f).name for f in one.files.values()
    ]
    for name, file in one.files.items():
        assert Path(file).read_text() == Path(other.files[name]).read_text()
    assert str(tmp_path) not in (tmp_path / "b" / "config.json").read_text()


def test_the_settings_of_a_captured_object_are_kept(tmp_path: Path) -> None:
    original = captured.llama().eval()
    original.generation_config = GenerationConfig(max_new_tokens=5, eos_token_id=[1, 7])
    program = reroll.capture(original)
    program.save(str(tmp_path))
    for model in (program.to_module(), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert model.generation_config.max_new_tokens == 5
        assert model.generation_config.eos_token_id == [1, 7]
    assert json.loads((tmp_path / "generation_config.json").read_text())["max_new_tokens"] == 5
    assert RerollConfig.from_program(program).vocab_size == 64
