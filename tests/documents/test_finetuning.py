"""The code of the page on fine-tuning runs, on a tiny model and on a real one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests import tiny
from tests.documents.pages import ROOT, blocks
from tests.documents.test_tutorial import run

CODE = list(blocks(ROOT / "docs" / "finetuning.md"))
NAMES = ("tied", "adapter", "merged", "tuned", "sentences", "longer")
MODEL = "models/smollm2-135m-instruct"


def run_page(model: Path, folder: Path) -> None:
    for package in ("trl", "sentence_transformers"):
        pytest.importorskip(package, reason="pip install -c constraints.txt -e '.[dev]'")
    places = {f'"{n}"': f'"{folder / n}"' for n in NAMES}
    run(CODE, {"__name__": "finetuning"}, {MODEL: str(model), **places})
    assert {p.name for p in folder.iterdir()} >= set(NAMES)


def test_it_runs_with_a_tiny_model(tmp_path: Path) -> None:
    assert [block.name for block in CODE] == ["adapters", "trl", "sentences", "tokens"]
    run_page(tiny.save(tiny.llama(), tmp_path / "model", tiny.tokenizer()), tmp_path)


@pytest.mark.slow
def test_it_runs_with_a_real_model(real_model: Callable[[str], Path], tmp_path: Path) -> None:
    run_page(real_model("smollm2-135m-instruct"), tmp_path)
