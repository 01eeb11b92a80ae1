"""The code of the page on fine-tuning runs, on a tiny model and on a real one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests import tiny
from tests.documents.pages import ROOT, blocks
from tests.documents.test_tutorial import run

CODE = list(blocks(ROOT / "docs" / "finetuning.md"))
MODEL = "models/smollm2-135m-instruct"


def run_page(model: Path, folder: Path) -> None:
    places = {f'"{n}"': f'"{folder / n}"' for n in ("tied", "adapter", "merged", "longer")}
    run(CODE, {"__name__": "finetuning"}, {MODEL: str(model), **places})
    assert {p.name for p in folder.iterdir()} >= {"tied", "adapter", "merged", "longer"}


def test_it_runs_with_a_tiny_model(tmp_path: Path) -> None:
    assert [block.name for block in CODE] == ["adapters", "tokens"]
    run_page(tiny.save(tiny.llama(), tmp_path / "model", tiny.tokenizer()), tmp_path)


@pytest.mark.slow
def test_it_runs_with_a_real_model(real_model: Callable[[str], Path], tmp_path: Path) -> None:
    run_page(real_model("smollm2-135m-instruct"), tmp_path)
