"""Which of the files beside a model are kept."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from reroll.rewrite.capture import models, side_files
from reroll.rewrite.capture.side_files import side_names, weight_names
from reroll.rewrite.checkpoint.hub import directory_of

MODULES = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]
KEPT = [
    "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "LICENSE",
    "additional_chat_templates/tools.jinja", "bpe.codes", "chat_template.jinja",
    "config_sentence_transformers.json", "entity_vocab.json", "generation_config.json",
    "modules.json", "source.spm", "speakers/one.npy", "tekken.json", "tokenizer.json", "vocab.txt",
]  # fmt: skip
LEFT = [
    # reroll's own, weights in other formats, code, hidden files
    "README.md", "config.json", "model.safetensors", "model.safetensors.index.json",
    "consolidated.safetensors", "pytorch_model.bin", "tf_model.h5", "model.gguf", "optimizer.pt",
    "modeling.py", "run.sh", ".gitattributes", ".git/config", ".cache/huggingface/x.json",
    # subfolders with weights are other forms of the model
    "onnx/model.onnx", "onnx/tokenizer.json", "original/tokenizer.model",
    "original/consolidated.00.pth", "checkpoint-5/model.safetensors",
    "checkpoint-5/trainer_state.json", "openvino/openvino_model.bin", "openvino/openvino_model.xml",
    # what could not be written everywhere
    "a:b.json",
]  # fmt: skip


def filled(directory: Path) -> Path:
    for name in KEPT + LEFT:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(json.dumps(MODULES) if name == "modules.json" else "{}")
    return directory


def test_everything_but_weights_and_code_is_kept(tmp_path: Path) -> None:
    found = side_files.side_files(filled(tmp_path))
    assert sorted(found) == KEPT
    assert all(Path(path) == tmp_path / name for name, path in found.items())


def test_weights_in_folders_are_kept_only_of_modules(tmp_path: Path) -> None:
    (filled(tmp_path) / "modules.json").write_text("not json")
    left = {"2_Dense/config.json", "2_Dense/model.safetensors"}
    assert sorted(side_files.side_files(tmp_path)) == [n for n in KEPT if n not in left]


def test_data_beside_a_model_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path)
    (tmp_path / "train.jsonl").write_text("x" * 3000)
    monkeypatch.setattr(side_files, "MAX_BYTES", 2000)
    assert sorted(side_files.side_files(tmp_path)) == KEPT
    monkeypatch.setattr(side_files, "MAX_FILES", 10)
    assert sorted(side_files.side_files(tmp_path)) == [n for n in KEPT if "/" not in n]


def test_the_same_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path)
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda *_, **__: KEPT + LEFT)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda _, name, **__: tmp_path / name)
    asked: list[list[str]] = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda _, allow_patterns, **__: asked.append(allow_patterns) or tmp_path,
    )
    for trust in (False, True):
        wanted = partial(models._files_to_download, "org/model", None, trust)
        assert directory_of("org/model", wanted) == tmp_path
    plain, trusted = map(set, asked)
    weights = {"model.safetensors", "model.safetensors.index.json"}
    assert plain == {"config.json", *weights, *KEPT}
    assert trusted - plain == {"modeling.py"}


def test_names_alone_say_which(tmp_path: Path) -> None:
    assert side_names(KEPT + LEFT, {"1_Pooling", "2_Dense"}) == KEPT
    assert weight_names(["m-1.safetensors", "a/model.safetensors"]) == ["m-1.safetensors"]
