"""Files of cases name functions that exist, and options that their cases have values of."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks import __main__ as benchmarks

NAMES = sorted(file.stem for file in benchmarks.CASES.glob("*.yaml"))
# pipelines for `benchmarks.untrained`
RUN = [name for name in NAMES if "run" in benchmarks.loaded(name)]


@pytest.mark.parametrize("name", RUN)
def test_a_file_of_cases_can_run(name, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks/__main__.py", name])
    benchmark, threads = benchmarks.loaded(name), torch.get_num_threads()
    try:
        options = benchmarks.read_options(benchmark)
    finally:
        torch.set_num_threads(threads)
    assert callable(benchmarks.function_of(benchmark))
    assert benchmark["columns"]
    assert bool(benchmarks.cases_of(benchmark, options)) == ("cases" in benchmark)


def test_a_name_that_is_unknown_is_answered_with_those_that_are_known():
    with pytest.raises(SystemExit, match="choose one of compile_time"):
        benchmarks.loaded("nothing")
