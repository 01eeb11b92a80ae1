"""The code of the tutorial runs, and prints what the page says."""

from __future__ import annotations

import contextlib
import doctest
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from reroll.rewrite.analysis.samples import sample_text
from tests import tiny
from tests.documents.pages import ROOT, Block, blocks

PAGE = ROOT / "docs" / "tutorial.md"
TOY = [block for block in blocks(PAGE) if block.name == ""]
REAL = [block for block in blocks(PAGE) if block.name == "real"]


def run(
    code: list[Block], names: dict[str, Any], change: Mapping[str, str], check: bool = True
) -> None:
    """Run blocks one after the other, with some of their text changed."""
    same = doctest.OutputChecker().check_output
    for block in code:
        text = block.code
        for old, new in change.items():
            text = text.replace(old, new)
        # the lines of an error are those of the page
        compiled = compile("\n" * block.line + text, str(PAGE), "exec", dont_inherit=True)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compiled, names)
        if check and block.output is not None:
            want, got = block.output, printed.getvalue()
            assert same(want, got, doctest.ELLIPSIS), f"line {block.line}: it prints\n{got}"


def test_the_toy_does_what_the_page_says() -> None:
    assert len(TOY) > 5
    run(TOY, {"__name__": "tutorial"}, {})


def test_the_toy_is_small() -> None:
    lines = [line for block in TOY for line in block.code.splitlines() if line.strip()]
    assert len(lines) <= 155


def test_the_real_part_runs_with_a_tiny_model(tmp_path: Path) -> None:
    model = tiny.save(tiny.llama(), tmp_path / "model", tiny.tokenizer())
    text = tmp_path / "text.txt"
    text.write_text(sample_text() * 3, encoding="utf-8")
    assert len(REAL) > 4
    run(REAL, {"__name__": "tutorial"}, places(model, text, tmp_path), check=False)
    assert (tmp_path / "near" / "program.json").is_file()


@pytest.mark.slow
def test_the_real_part_does_what_the_page_says(
    real_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = real_model("smollm2-135m-instruct")
    text = ROOT / "data" / "text" / "wiki.val.txt"
    if not text.exists():
        pytest.skip("data/text is not there: make models NAMES=text:wiki")
    # half precision rounds; the page is about the checkpoint in fp32
    exact = not model.name.endswith("bf16")
    run(REAL, {"__name__": "tutorial"}, places(model, text, tmp_path), exact)


def places(model: Path, text: Path, out: Path) -> dict[str, str]:
    """The paths of the page, and those that stand for them."""
    return {
        "models/smollm2-135m-instruct": str(model),
        "data/text/wiki.val.txt": str(text),
        "out/near": str(out / "near"),
    }
