"""What pipelines of passes leave of a model, and what recoveries bring back: see the cases.

A file has templates of `pipelines`, whose fields take the values of options, or of keys of the
file. `measures` are taken as `reroll evaluate` takes them, beside the original, and those of
`alone` without it; `measured` is a function in their place. With `calibrate`, passes read that
text. A pipeline is measured as it is and after each recovery, which
is trained on `--data` once, and kept in `--work`. `--only` keeps pipelines with one of the texts in
their name, `--passes` takes others in their place. `recoveries` are stages by title, below a text
that is in the names of their pipelines. The first row is the original.
"""

from __future__ import annotations

import json
import re
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, lru_cache, partial
from itertools import product
from pathlib import Path
from string import Formatter
from typing import Any

import torch

import reroll
from benchmarks.harness import Row, Table, function_of, progress
from reroll.cli.recovering import token_count
from reroll.evaluate.subjects import Opening, Subject, open_subject
from reroll.evaluate.suite import choose, evaluate
from reroll.recover import Recipe, recover
from reroll.recover.recipe import parse
from reroll.rewrite.ir.program import Program
from reroll.rewrite.pipeline.pipeline import read_yaml, recipe_path

# what a file of cases may have, and has not to
DEFAULTS: Row = {
    "image": 0, "calibrate": None, "recoveries": {}, "batch": 0, "data": (), "make_data": None,
    "measured": "pipelines.evaluated", "alone": "", "ratios": False,
}  # fmt: skip
RESIDUAL = re.compile(r"relative residual left (\d\.\d+)")
# the original, or a pipeline, and what it is trained by
Run = tuple[str, str]


def expanded(options: Namespace) -> Iterator[Run]:
    """Name and text of each pipeline: every template with every choice of its fields' values."""
    given = [text for text in options.passes.split(";") if text]
    for name, template in ({} if given else options.pipelines).items():
        fields = dict.fromkeys(f for _, f, _, _ in Formatter().parse(template) if f)
        taken = [getattr(options, field) for field in fields]
        for choice in product(*([v] if isinstance(v, str) else v for v in taken)):
            values = dict(zip(fields, choice, strict=True))
            label = name.format(**values)
            if any(text in label for text in options.only.split(";")):
                yield label, template.format(**values)
    yield from zip(given, given, strict=True)


def recoveries(options: Namespace) -> dict[Run, tuple[str | Path, Recipe | None]]:
    """Passes of each pipeline, by its name and that of a recovery, which is none at first."""
    found: dict[Run, tuple[str | Path, Recipe | None]] = {}
    for name, passes in expanded(options):
        found[name, ""] = passes, None
        for text, by_title in getattr(options, "recoveries", {}).items():
            for title, stages in by_title.items() if text in name else ():
                recipe = parse({"recover": options.settings | {"stages": stages}})
                found[name, title] = passes, recipe
    # recipes of files, which the command line names
    for path in map(recipe_path, options.name[1:]):
        found[path.stem, ""] = path, None
        if "recover" in (data := dict(read_yaml(path))):  # type: ignore[call-overload]
            found[path.stem, "recovered"] = path, parse(data)
    return found


def measure(table: Table, options: Namespace) -> None:
    """Measure the original, and every pipeline that has no row yet."""
    options = Namespace(**DEFAULTS | vars(options))
    pictures = {"pixel_values": torch.zeros(2, 3, options.image, options.image)}
    inputs = pictures if options.image else None
    original = reroll.capture(options.model, inputs=inputs, dtype="float32")
    rewritten = lru_cache(1)(partial(_rewritten, original, options))
    runs = {("original", ""): (None, None), **recoveries(options)}
    for case in table.missing({"pipeline": name, "recovery": after} for name, after in runs):
        passes, recipe = runs[case["pipeline"], case["recovery"]]
        program, remarks = rewritten(passes)
        left = [float(match[1]) for remark in remarks if (match := RESIDUAL.search(remark))]
        case |= {"parameters, M": program.parameters() / 1e6, "passes": str(passes or "")}
        case["residual left"] = sum(left) / len(left) if left else None
        if recipe:
            program, cost = _recovered(program, original, recipe, case, options)
            case |= cost
        measured = function_of(options.measured)(program, original, options)
        table.add(case | measured | {"remarks": remarks})


def _rewritten(
    original: Program, options: Namespace, passes: str | Path | None
) -> tuple[Program, list[str]]:
    """The original, or a model of its own after some passes, and what they remarked."""
    if passes is None:
        return original, []
    sample = options.calibrate and Path(options.calibrate)
    program = reroll.run_passes(original, passes, text=sample, measure=False)
    return replace(program), [remark for step in program.origin.steps for remark in step.remarks]


def _recovered(
    student: Program, original: Program, recipe: Recipe, case: Row, options: Namespace
) -> tuple[Program, Row]:
    """A model after its recovery, and what that took: trained if it is not there."""
    tokens = token_count(options.tokens)
    words = re.findall(r"[\w.=-]+", f"{case['pipeline']} {case['recovery']} {tokens}")
    out = Path(options.work, "-".join(words))
    if not out.is_dir():
        out.parent.mkdir(parents=True, exist_ok=True)
        if options.batch:
            recipe = Recipe(replace(recipe.settings, batch=options.batch), recipe.stages)
        data = function_of(options.make_data)(options) if options.make_data else options.data
        recover(
            student, out, data=data, recipe=recipe, tokens=tokens, teacher=original,
            on_step=progress(out.name),
        )  # fmt: skip
    program = reroll.load(out)
    run = program.origin.steps[-1]
    log = (out / "recovery.jsonl").read_text(encoding="utf-8").splitlines()
    steps = torch.tensor([line["loss"] for line in map(json.loads, log) if "loss" in line])
    losses = ", ".join(f"{part.mean():.3g}" for part in steps.chunk(8)) if len(steps) else None
    # perplexity of the data's held-out rows, times the original's
    first, *_, last = (
        held["perplexity"] / held["original_perplexity"] if "perplexity" in held else None
        for held in run.measured["held_out"]
    )
    own = {"own data, before": first, "own data": last, "held out": run.measured["held_out"]}
    cost = {"tokens": run.measured["tokens"], "seconds": run.seconds, "losses": losses}
    return program, own | cost


def evaluated(model: Any, original: Program, options: Namespace) -> Row:
    """The headline numbers of a model by label, and with `ratios` what they are of the original's.

    The original is opened by transformers, with SDPA attention.
    """
    opened = _opened(options.model)
    model = opened if model is original else model
    rows: Row = {}
    for text, beside in ((options.measures, opened), (options.alone, None)):
        if not text:
            continue
        chosen = choose(text, "quick")
        found = evaluate(model, beside, chosen, text=Path(options.text))
        for name, measure in found["measures"].items():
            if measure["status"] != "done":
                raise SystemExit(f"{name}: {measure.get('error') or measure.get('reason')}")
            ours, theirs = measure["headline"]["model"], measure["headline"].get("original")
            rows |= ours
            for label, value in ours.items() if options.ratios else ():
                if value and theirs[label]:
                    rows[f"{label}, ratio"] = value / theirs[label]
    return rows


@cache
def _opened(model: str) -> Subject:
    return open_subject(model, Opening(dtype=torch.float32, attention="sdpa"))
