"""Rewritten models before any training: what pipelines of passes leave of the original.

    python -m benchmarks.untrained tying [--model DIR] [--only "TEXT;TEXT"] [--json FILE]
        [--passes "PIPELINE;PIPELINE"]

A file of `benchmarks/cases` has the measures, as `reroll evaluate` takes them, and templates of
pipelines with the values that their fields take. `--only` keeps pipelines that have one of the
texts in their name, `--passes` takes others in their place. The first row is the original.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from string import Formatter
from typing import Any

import yaml

import reroll
from benchmarks.harness import MODEL, Row, Table, parse_options
from reroll.evaluate.suite import choose, evaluate
from reroll.rewrite.pipeline.registry import load_file

RESIDUAL = re.compile(r"relative residual left (\d\.\d+)")


def pipelines(cases: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and text of each pipeline: every template with every choice of its fields' values."""
    for name, template in cases["pipelines"].items():
        fields = dict.fromkeys(f for _, f, _, _ in Formatter().parse(template) if f)
        for choice in product(*(cases["fields"][field] for field in fields)):
            values = dict(zip(fields, choice, strict=True))
            yield name.format(**values) or template.format(**values), template.format(**values)


def measured(model: Any, original: Any, cases: dict[str, Any]) -> Row:
    """The headline numbers of a model by label."""
    measures = choose(cases["measures"], "quick")
    found = evaluate(model, original, measures, text=Path(cases["text"]))
    rows: Row = {}
    for name, measure in found["measures"].items():
        if measure["status"] != "done":
            raise SystemExit(f"{name}: {measure.get('error') or measure.get('reason')}")
        rows |= measure["headline"]["model"]
    return rows


def main() -> None:
    """Measure every pipeline of the cases that has no row yet."""
    options = parse_options(__doc__, "cases", model=MODEL, only="", passes="")
    file = Path(__file__).with_name("cases") / f"{options.cases[0]}.yaml"
    cases = yaml.safe_load(file.read_text(encoding="utf-8"))
    if "load" in cases:
        load_file(Path(cases["load"]))
    original = reroll.capture(options.model, dtype="float32")
    first = measured(original, original, cases)
    columns = {"pipeline": "{}", "parameters, M": "{:.1f}"} | dict.fromkeys(first, "{:,.4g}")
    table = Table(options, columns | {"residual left": "{:.3f}"})
    given = {text: text for text in options.passes.split(";") if text}
    texts = {"original": "", **(given or dict(pipelines(cases)))}
    wanted = options.only.split(";")
    for case in table.missing({"pipeline": name} for name in texts):
        name = case["pipeline"]
        if name != "original" and not any(text in name for text in wanted):
            continue
        program, remarks = original, list[str]()
        if texts[name]:
            sample = Path(cases["calibrate"])
            program = reroll.run_passes(original, texts[name], text=sample, measure=False)
            remarks = [remark for step in program.origin.steps for remark in step.remarks]
        left = [float(match[1]) for remark in remarks if (match := RESIDUAL.search(remark))]
        case |= {"parameters, M": program.parameters() / 1e6, "passes": texts[name]}
        case["residual left"] = sum(left) / len(left) if left else None
        values = measured(program, original, cases) if texts[name] else first
        table.add(case | values | {"remarks": remarks})


if __name__ == "__main__":
    main()
