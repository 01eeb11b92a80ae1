"""Text that a model writes itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from reroll.cli.app import app
from reroll.recover.data import documents
from reroll.recover.sampling import sampled_texts
from tests import tiny


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.llama(), tmp_path_factory.mktemp("made") / "model", tiny.tokenizer())


def test_texts_are_the_same_for_a_seed(original: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(original).eval()
    tokenizer = AutoTokenizer.from_pretrained(original)

    def written(seed: int) -> list[str]:
        options = {"tokens": 50, "length": 12, "batch": 3, "start": "the", "seed": seed}
        return list(sampled_texts(model, tokenizer, **options))  # type: ignore[arg-type]

    texts = written(0)
    assert texts == written(0) != written(1)
    # two rounds of three texts of 12 tokens, until there are 50
    assert 4 <= len(texts) <= 6


def test_the_command_writes_what_recover_reads(original: Path, tmp_path: Path) -> None:
    out = tmp_path / "own.jsonl"
    command = [
        "sample",
        str(original),
        str(out),
        "--tokens",
        "40",
        "--length",
        "10",
        "--batch",
        "2",
    ]
    assert CliRunner().invoke(app, command).exit_code == 0
    texts = [json.loads(line)["text"] for line in out.read_text(encoding="utf-8").splitlines()]
    assert list(documents(out)) == texts
    assert texts
    again = CliRunner().invoke(app, command)
    assert again.exit_code != 0
    assert list(tmp_path.iterdir()) == [out]
