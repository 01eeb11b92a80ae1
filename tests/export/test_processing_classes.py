"""The classes of tokenizers and processors survive in what is saved, whatever the files name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoFeatureExtractor,
    AutoProcessor,
    AutoTokenizer,
    BertConfig,
    BertTokenizer,
    LlamaConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
)

import reroll
from reroll.export.huggingface import save
from reroll.export.processing_classes import processing_classes
from reroll.rewrite.capture.side_files import side_files
from tests import captured, tiny

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "##c"]


def saved(directory: Path, out: Path) -> Path:
    """A converted model with the files of a directory beside it."""
    program = captured.captured("llama")
    files = {**side_files(directory)}
    save(replace(program, origin=replace(program.origin, files=files)), out)
    return out


def bert(directory: Path, **entries: Any) -> Path:
    """The tokenizer of BERT, in files that name no class."""
    BertConfig().save_pretrained(directory)
    (directory / "vocab.txt").write_text("\n".join(WORDS))
    (directory / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True, **entries}))
    return directory


def test_a_class_that_the_model_type_gives_is_named_in_the_configuration(tmp_path: Path) -> None:
    path = bert(tmp_path / "in")
    assert processing_classes(path)["tokenizer_class"] == "BertTokenizer"
    out = saved(path, tmp_path / "out")
    original, found = (AutoTokenizer.from_pretrained(p) for p in (path, out))
    assert type(found) is type(original) is BertTokenizer
    assert found.mask_token == "[MASK]"
    assert found("a", "bc") == original("a", "bc")
    # the file itself is as it was, and the class stays when it is saved again
    for name in ("tokenizer_config.json", "vocab.txt"):
        assert (out / name).read_bytes() == (path / name).read_bytes()
    save(reroll.load(out), tmp_path / "again")
    assert type(AutoTokenizer.from_pretrained(tmp_path / "again")) is BertTokenizer
    assert (tmp_path / "again" / "config.json").read_text() == (out / "config.json").read_text()
    reroll.load(out).to_module().save_pretrained(tmp_path / "third")
    assert type(AutoTokenizer.from_pretrained(tmp_path / "third")) is BertTokenizer


@pytest.mark.parametrize(
    ("model_type", "named"),
    [("llama", "Qwen2Tokenizer"), ("deepseek_v3", "LlamaTokenizerFast"), ("phi3", "GPT2Tokenizer")],
)
def test_a_class_that_the_model_type_overrides_is_changed(
    tmp_path: Path, model_type: str, named: str
) -> None:
    path = tmp_path / "in"
    config = LlamaConfig().to_dict() | {"model_type": model_type}
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    tiny.tokenizer().save_pretrained(path)
    entries = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**entries, "tokenizer_class": named}))
    out = saved(path, tmp_path / "out")
    original, found = (AutoTokenizer.from_pretrained(p) for p in (path, out))
    assert type(found) is type(original)
    assert found("some words").input_ids == original("some words").input_ids


def test_processors_survive(tmp_path: Path) -> None:
    path = tmp_path / "in"
    WhisperConfig().save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    WhisperFeatureExtractor().save_pretrained(path)
    for name in ("tokenizer_config.json", "preprocessor_config.json"):
        entries = json.loads((path / name).read_text())
        for key in ("tokenizer_class", "processor_class", "feature_extractor_type"):
            entries.pop(key, None)
        (path / name).write_text(json.dumps(entries))
    expected = processing_classes(path)
    assert expected["feature_extractor_type"] == "WhisperFeatureExtractor"
    assert expected["processor_class"] == "WhisperProcessor"
    out = saved(path, tmp_path / "out")
    assert processing_classes(out) == expected
    for auto in (AutoFeatureExtractor, AutoProcessor):
        assert type(auto.from_pretrained(out)) is type(auto.from_pretrained(path))


def test_code_beside_a_model_is_not_run(tmp_path: Path) -> None:
    path = bert(tmp_path / "in", auto_map={"AutoTokenizer": ["mine.Mine", None]})
    (path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n")
    out = saved(path, tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    assert not (out / "mine.py").exists()


def test_an_embedding_model_keeps_its_modules_and_prompts(tmp_path: Path) -> None:
    path = bert(tmp_path / "in")
    modules = [{"idx": i, "path": p} for i, p in enumerate(["", "1_Pooling", "2_Dense"])]
    files = {
        "modules.json": modules,
        "config_sentence_transformers.json": {"prompts": {"query": "q: "}},
        "sentence_bert_config.json": {"max_seq_length": 256},
        "1_Pooling/config.json": {"pooling_mode_mean_tokens": True},
        "2_Dense/config.json": {"in_features": 32, "out_features": 8},
    }  # fmt: skip
    for name, data in files.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(json.dumps(data))
    save_file({"linear.weight": torch.ones(8, 32)}, path / "2_Dense" / "model.safetensors")
    out = saved(path, tmp_path / "out")
    save(reroll.load(out), tmp_path / "again")
    for directory in (out, tmp_path / "again"):
        for name in files:
            assert (directory / name).read_bytes() == (path / name).read_bytes()
        dense = load_file(directory / "2_Dense" / "model.safetensors")
        assert torch.equal(dense["linear.weight"], torch.ones(8, 32))
