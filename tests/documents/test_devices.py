"""The examples of the page on devices run, and print what the page says."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest
import torch

from tests.captured import captured
from tests.documents.pages import ROOT, Block, blocks

BLOCKS = list(blocks(ROOT / "docs" / "devices.md"))


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_the_example_prints_what_the_page_says(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured("llama").save(str(tmp_path / "converted"))
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block.code, f"docs/devices.md:{block.line}", "exec"), {})
    torch.compiler.reset()
    assert printed.getvalue() == block.output
