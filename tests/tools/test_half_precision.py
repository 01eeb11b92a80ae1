from pathlib import Path

import pytest
import torch
import transformers

from tests import tiny
from tools.half_precision import narrow
from tools.models import select
from tools.pretrained import MODELS, in_bf16


def same(model: torch.nn.Module, narrowed: torch.nn.Module) -> bool:
    pairs = zip(model.parameters(), narrowed.parameters(), strict=True)
    return all(torch.equal(a.bfloat16(), b) for a, b in pairs)


def names(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*")}


def test_a_directory_is_saved_in_bf16_with_all_that_stands_beside(tmp_path: Path) -> None:
    model = tiny.llama()
    source = tiny.save(model, tmp_path / "tiny", tiny.tokenizer())
    (source / "1_Dense").mkdir()
    (source / "1_Dense" / "model.safetensors").write_bytes(b"as it is")
    narrow(source, tmp_path / "out")
    assert names(source) == names(tmp_path / "out")
    assert (tmp_path / "out" / "1_Dense" / "model.safetensors").read_bytes() == b"as it is"
    narrowed = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert narrowed.dtype == torch.bfloat16
    assert same(model, narrowed)


def test_every_model_has_a_form_in_bf16() -> None:
    made = {target.name for target in select([])}
    assert {f"{name}-bf16" for name in MODELS} < made


def test_the_fp32_form_is_made_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(folder: Path, work: Path) -> None:
        tiny.save(tiny.llama(), folder / "minilm-l6-v2", tiny.tokenizer())

    monkeypatch.setitem(MODELS, "minilm-l6-v2", MODELS["minilm-l6-v2"].__class__(build, (), ""))
    in_bf16("minilm-l6-v2", tmp_path, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["minilm-l6-v2", "minilm-l6-v2-bf16"]
