"""The harness of benchmarks: options, tables that are kept and resumed, timing in turns."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import harness

COLUMNS = {"context": "{:,}", "of": "`{}`", "ratio": "{:.2f}"}


@pytest.fixture
def called(monkeypatch):
    def call(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["benchmarks/speed.py", *words])

    call()
    return call


def parsed(**defaults: Any) -> Namespace:
    threads = torch.get_num_threads()
    try:
        return harness.parse_options("What is measured.", **defaults)
    finally:
        torch.set_num_threads(threads)


def test_options_have_the_types_of_their_defaults(called):
    called("--contexts", "128,1024", "--full", "--rate", "2", "--work", "out", "--sides", "a,b")
    found = parsed(contexts=(1,), full=False, rate=1.0, work=Path, sides=("x",), name="n")
    assert (found.contexts, found.full, found.rate) == ((128, 1024), True, 2.0)
    assert (found.work, found.sides, found.name) == (Path("out"), ("a", "b"), "n")
    assert found.json is None
    assert found.threads == 1


def test_a_title_with_an_asterisk_is_for_further_numbers(called, capsys):
    table = harness.Table(Namespace(json=None), {"": "{}", "* ms": "{:.1f}", "*": "{:.0f}"})
    table.add({"": "x", "a": 2.0, "b ms": 1.25, "beside": "y"})
    assert capsys.readouterr().out.splitlines()[::2] == ["|  | b ms | a |", "| x | 1.2 | 2 |"]


def test_a_table_is_printed_row_by_row(called, capsys):
    table = harness.Table(Namespace(json=None), COLUMNS)
    table.add({"context": 1024, "of": "x", "ratio": 1.239, "beside": 3})
    table.add({"context": 8192, "of": "y", "ratio": None})
    assert capsys.readouterr().out.splitlines() == [
        "| context | of | ratio |",
        "| ---: | --- | ---: |",
        "| 1,024 | `x` | 1.24 |",
        "| 8,192 | `y` |  |",
    ]


def test_the_same_command_goes_on_where_it_stopped(called, tmp_path, capsys):
    options = Namespace(json=tmp_path / "speed.json")
    called("--model", "a b", "--json", "speed.json")
    cases = [{"context": n} for n in (1, 2, 3)]
    table = harness.Table(options, COLUMNS)
    for case in list(table.missing(cases))[:2]:
        table.add(case | {"of": "x", "ratio": 1.0})
    again = harness.Table(options, COLUMNS)
    assert list(again.missing(cases)) == [{"context": 3}]
    kept = json.loads(options.json.read_text())
    assert kept["command"] == 'python -m benchmarks.speed --model "a b"'
    assert [row["context"] for row in kept["rows"]] == [1, 2]
    assert kept["columns"] == COLUMNS
    called("--model", "c")
    with pytest.raises(SystemExit, match="choose another"):
        harness.Table(options, COLUMNS)


def test_rows_of_a_later_commit_say_so(called, tmp_path, monkeypatch):
    options = Namespace(json=tmp_path / "speed.json")
    for now, context in (("aaaaaaa", 1), ("bbbbbbb", 2)):
        monkeypatch.setattr(harness, "commit", lambda now=now: now)
        harness.Table(options, COLUMNS).add({"context": context})
    kept = json.loads(options.json.read_text())
    assert kept["commit"] == "aaaaaaa"
    assert kept["rows"] == [{"context": 1}, {"context": 2, "commit": "bbbbbbb"}]


def test_parts_are_files_beside_each_other(called, tmp_path):
    table = harness.Table(Namespace(json=tmp_path / "speed.json"), COLUMNS, "long")
    table.add({"context": 1})
    assert [p.name for p in tmp_path.iterdir()] == ["speed-long.json"]


def test_sides_take_turns():
    order: list[str] = []
    sides = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = harness.in_turns(sides, 2, warm=1)
    assert order == ["b", "a", "a", "b", "b", "a"]
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}
    assert harness.best(seconds)["a"] <= harness.medians(seconds)["a"]


def test_a_process_that_fails_says_why():
    row = harness.run_process([sys.executable, "-c", "print(7)"])
    assert row["output"] == "7\n"
    assert row["peak MB"] > 1
    with pytest.raises(SystemExit, match="no such thing"):
        harness.run_process([sys.executable, "-c", "raise SystemExit('no such thing')"])
