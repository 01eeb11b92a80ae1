"""Run a benchmark.

    python -m benchmarks NAME [WORD ...] [--help] [--json FILE] [--OPTION VALUE ...]

A benchmark is a file of `benchmarks/cases`. `about` says what is measured and beside what, `run` is
the function that does it, as `module.function`. `options` are those of the command line with their
defaults, of which null is text without one. `cases` maps titles to their values, in full or as the
name of an option: there is a row for each choice. `columns` are those of the `Table`. What else the
file has is given to the function with the options.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from benchmarks.harness import Row, Table, function_of, parse_options

CASES = Path(__file__).with_name("cases")


def loaded(name: str) -> dict[str, Any]:
    """The content of a file of cases."""
    file = CASES / f"{name}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(each.stem for each in CASES.glob("*.yaml")))
        raise SystemExit(f"{name} is not a benchmark: choose one of {known}")
    return dict(yaml.safe_load(file.read_text(encoding="utf-8")))


def read_options(benchmark: dict[str, Any], words: list[str] | None = None) -> Namespace:
    """The options of the command line, and what else the benchmark's file has."""
    defaults = {
        name: tuple(value) if isinstance(value, list) else str if value is None else value
        for name, value in benchmark.get("options", {}).items()
    }
    options = parse_options(benchmark["about"], "name", words=words, **defaults)
    return Namespace(**benchmark | vars(options))


def cases_of(benchmark: dict[str, Any], options: Namespace) -> list[Row]:
    """Every choice of values for the titles of `cases`; none if the function makes its own."""
    titles = benchmark.get("cases", {})
    values = [getattr(options, v) if isinstance(v, str) else v for v in titles.values()]
    choices = product(*values) if titles else ()
    return [dict(zip(titles, choice, strict=True)) for choice in choices]


def main(words: list[str]) -> None:
    """Add the rows that are missing of the benchmark that is the first word."""
    if not words or words[0].startswith("-"):
        raise SystemExit(__doc__)
    benchmark = loaded(words[0])
    options = read_options(benchmark, words)
    table = Table(options, benchmark["columns"], cases=cases_of(benchmark, options))
    function_of(benchmark["run"])(table, options)


if __name__ == "__main__":
    main(sys.argv[1:])
