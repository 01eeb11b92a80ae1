"""What is in a saved directory: shards, side files, the model card, progress."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import reroll
from reroll.errors import ExportError, UsageError
from reroll.export import shards
from reroll.export.huggingface import save
from reroll.export.model_card import model_card
from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.records import Step
from reroll.rewrite.ir.weights import Weight, full
from tests import captured, tiny

pytestmark = pytest.mark.usefixtures("captured_once")

IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))


def contents(directory: Path) -> dict[str, bytes]:
    files = (f for f in sorted(directory.rglob("*")) if f.is_file())
    return {f.relative_to(directory).as_posix(): f.read_bytes() for f in files}


def with_files(program: Program, files: dict[str, str]) -> Program:
    return replace(program, origin=replace(program.origin, files=files))


def test_shards_hold_the_same_and_are_the_same_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(captured.captured("llama"), tmp_path / "whole")
    monkeypatch.setattr(shards.save_outputs, "__defaults__", (None, 20_000))
    save(captured.captured("llama"), tmp_path / "a")
    save(reroll.load(tmp_path / "a"), tmp_path / "b")
    assert len(list((tmp_path / "a").glob("model-*.safetensors"))) > 3
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / n) for n in ("whole", "a")]
    assert torch.equal(models[0](IDS).logits, models[1](IDS).logits)


def test_every_tensor_is_stored_once(tmp_path: Path) -> None:
    program = captured.captured("llama")
    save(program, tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        stored = sum(file.get_tensor(n).numel() for n in names)
    assert "lm_head.weight" not in names
    buffers = sum(w.elements() for w in program.weights.values() if not w.trainable)
    assert stored == program.parameters() + buffers


def test_equal_constants_stay_apart(tmp_path: Path) -> None:
    program = captured.captured("llama")
    name = "model.layers.*.input_layernorm.weight"
    ones = full(program.weights[name].meta.shape, 1.0, torch.float32)
    weights = program.weights.with_weight(name, Weight((ones,) * 4, (0, 1, 2, 3)))
    save(program.with_weights(weights), tmp_path / "out")
    model = reroll.load(tmp_path / "out").to_module()
    norms = [model.get_parameter(name.replace("*", str(t))) for t in range(4)]
    assert len({id(n) for n in norms}) == 4


def test_progress_counts_bytes_to_the_end(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    save(captured.captured("llama"), tmp_path / "out", progress=lambda *x: seen.append(x))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len({total for _, total in seen}) == 1
    assert seen[-1][0] == seen[-1][1]


def test_side_files_are_copied_and_named_without_a_place(tmp_path: Path) -> None:
    source = tmp_path / "original"
    tiny.tokenizer().save_pretrained(str(source))
    (source / "sub").mkdir()
    (source / "sub" / "more.json").write_text("{}")
    files = {p: str(source / p) for p in contents(source)}
    save(with_files(captured.captured("llama"), files), tmp_path / "out")
    for name, data in contents(source).items():
        assert (tmp_path / "out" / name).read_bytes() == data
    assert str(tmp_path) not in (tmp_path / "out" / "program.json").read_text()
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    assert tokenizer("a word").input_ids == tiny.tokenizer()("a word").input_ids
    # and again from what was saved
    save(reroll.load(tmp_path / "out"), tmp_path / "again")
    assert contents(tmp_path / "out") == contents(tmp_path / "again")


@pytest.mark.parametrize(
    "name",
    ["../x", "/tmp/x", "a/../x", "a\\x", "", "config.json", "README.md", "x.safetensors"],
)
def test_a_side_file_with_a_bad_name_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ExportError):
        save(
            with_files(captured.captured("llama"), {name: str(tmp_path / "file")}),
            tmp_path / "out",
        )
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_side_file_that_is_gone_is_named(tmp_path: Path) -> None:
    program = with_files(captured.captured("llama"), {"vocab.txt": str(tmp_path / "gone")})
    with pytest.raises(ExportError, match=r"vocab\.txt"):
        save(program, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_save_pretrained_keeps_what_else_is_there(tmp_path: Path) -> None:
    model = captured.captured("llama").to_module()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "optimizer.pt").write_text("mine")
    for _ in range(2):
        model.save_pretrained(tmp_path / "out")
    files = contents(tmp_path / "out")
    assert files["optimizer.pt"] == b"mine"
    assert set(files) >= {"config.json", "program.json", "model.safetensors"}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_overwriting_the_directory_that_is_being_read(tmp_path: Path) -> None:
    save(captured.captured("llama"), tmp_path / "out")
    before = contents(tmp_path / "out")
    save(reroll.load(tmp_path / "out"), tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == before


class TestModelCard:
    def card(self, **changes: Any) -> str:
        program = captured.captured("llama")
        return model_card(replace(program, origin=replace(program.origin, **changes)))

    def metadata(self, card: str) -> dict[str, Any]:
        return yaml.safe_load(card.split("---")[1])  # type: ignore[no-any-return]

    def test_recipe_remarks_and_measurements(self) -> None:
        steps = (
            Step("tie(blocks=2)", 1.25, ("30 layers to 2",), {"kl": 0.01234567}),
            Step("relax(rank=4)", 0.5, (), {"kl": 0.001, "top1": "99%"}),
        )
        card = self.card(model="org/name", revision="abc", steps=steps)
        assert self.metadata(card)["base_model"] == "org/name"
        for text in ("tie(blocks=2)", "1.2 s", "30 layers to 2", "0.01235", "99%", "abc"):
            assert text in card

    def test_measures_of_several_numbers_are_told_as_text(self) -> None:
        step = Step("tie", 1.0, (), {"state_bytes": {"1024": 10, "4096": 0.123456}})
        assert "| 1024: 10, 4096: 0.1235 |" in self.card(steps=(step,))

    def test_it_does_not_name_a_place_on_a_disk(self) -> None:
        card = self.card(model="/home/me/models/name")
        assert "/home" not in card
        assert "base_model" not in self.metadata(card)

    def test_remarks_cannot_become_markup(self) -> None:
        remark = "x</script>\n# heading [a](javascript:b) | `c`"
        step = Step("a | `b`\n---", 0.0, (remark,), {"k|": "v|"})
        card = self.card(steps=(step,), remarks=(remark,))
        assert card.count("heading") == 2
        assert "\n# heading" not in card
        assert "<" not in card.replace("\\<", "")
        assert "](" not in card.replace("\\]", "")
        assert card.count("\n---\n") == 1


def test_the_configuration_says_what_transformers_asks(tmp_path: Path) -> None:
    save(captured.captured("gemma3"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "reroll"
    assert config["architectures"] == ["RerollForCausalLM"]
    assert config["layer_types"][:2] == ["sliding_attention", "full_attention"]
    assert config["sliding_window"] == 8
    assert config["vocab_size"] == 64
    assert config["original_model_type"] == "gemma3_text"


def test_a_model_is_not_saved_over_what_it_was_captured_from(tmp_path: Path) -> None:
    original = tiny.save(tiny.llama(), tmp_path / "original")
    before = contents(original)
    program = reroll.capture(str(original))
    for directory in (original, tmp_path, original / "out"):
        with pytest.raises(UsageError):
            program.save(str(directory), overwrite=True)
    model = program.to_module()
    with pytest.raises(UsageError, match="captured from there"):
        model.save_pretrained(original)
    model.save_pretrained(original / "checkpoint-1")
    assert {k: v for k, v in contents(original).items() if "checkpoint-1" not in k} == before
    # what reroll saved may be saved where it is: training writes its results there
    saved = AutoModelForCausalLM.from_pretrained(original / "checkpoint-1")
    with torch.no_grad():
        saved.lm_head.weight.mul_(2)
    saved.save_pretrained(original / "checkpoint-1")
    reroll.load(original / "checkpoint-1").save(str(original / "checkpoint-1"), overwrite=True)
    again = AutoModelForCausalLM.from_pretrained(original / "checkpoint-1")
    assert torch.equal(saved(IDS).logits, again(IDS).logits)
