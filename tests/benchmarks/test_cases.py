"""Files of cases name functions that exist, and options that their cases have values of."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as benchmarks
from benchmarks.harness import function_of

NAMES = sorted(file.stem for file in benchmarks.CASES.glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_cases_can_run(name, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks/__main__.py", name])
    benchmark, threads = benchmarks.loaded(name), torch.get_num_threads()
    try:
        options = benchmarks.read_options(benchmark)
    finally:
        torch.set_num_threads(threads)
    named = [benchmark[key] for key in ("run", "measured", "make_data") if key in benchmark]
    assert "run" in benchmark
    assert all(callable(function_of(name)) for name in named)
    assert benchmark["columns"]
    assert bool(benchmarks.cases_of(benchmark, options)) == ("cases" in benchmark)


def test_a_name_that_is_unknown_is_answered_with_those_that_are_known():
    with pytest.raises(SystemExit, match="choose one of compile_time"):
        benchmarks.loaded("nothing")


ROOT = Path(__file__).parents[2]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")])
# what a page runs at an earlier commit is not looked for here
COMMAND = re.compile(r"(?<!&& )python -m\s+benchmarks( |\.)(\w+)((?:[^`\n\\]|\\\n)*)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_on_pages_name_benchmarks_and_their_options(page):
    for between, name, words in COMMAND.findall(page.read_text(encoding="utf-8")):
        if between == ".":
            assert (ROOT / "benchmarks" / f"{name}.py").is_file(), name
        elif name != "NAME":
            known = benchmarks.loaded(name).get("options", {}).keys() | {"threads", "json"}
            assert {n.replace("-", "_") for n in re.findall(r"--([a-z-]+)", words)} <= known
