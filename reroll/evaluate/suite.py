"""Run measures on a model, one after the other, so that the failure of one stops no other."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from reroll.bounds import COUNT, SEED, check_number
from reroll.errors import RerollError, UsageError
from reroll.evaluate.harness import Harness
from reroll.evaluate.measure import Bench, Measure, NotApplicable, Progress, Suite, find, measures
from reroll.evaluate.runner import Runner
from reroll.evaluate.subjects import Opening, Subject, open_subject
from reroll.evaluate.tokenizing import read_text
from reroll.rewrite.pipeline.pipeline_parser import parse_calls

log = logging.getLogger(__name__)


def choose(text: str | None, suite: Suite) -> tuple[Measure, ...]:
    """Parse measures such as `perplexity, recall(samples=2)`; None is all measures.

    Raises UsageError for a measure or option that does not exist.
    """
    if suite not in ("quick", "full"):
        raise UsageError(f"{suite!r} is not a suite", where="--suite", hint="quick or full")
    if text is None:
        return tuple(cls.of_suite(suite, {}) for cls in measures().values())
    calls = parse_calls(text)
    if not calls:
        raise UsageError("no measure is named", where="--measures", hint=", ".join(measures()))
    return tuple(find(call.name).of_suite(suite, call.options) for call in calls)


def evaluate(
    model: Any,
    original: Any | None = None,
    measures: Sequence[Measure] | None = None,
    *,
    suite: Suite = "quick",
    text: str | Path | None = None,
    opening: Opening | None = None,
    seed: int = 0,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a model, and its original for comparison if there is one, as JSON data.

    Args:
        model: a path, a hub id, a Program, a module or a Subject.
        original: the model to compare with, of the same kinds.
        measures: all of the suite by default.
        suite: "quick" or "full".
        text: text, or a file with text (`Path`); a sample is included.
        opening: how models are opened; by default with transformers' SDPA attention.
        seed: of all random choices: the same seed asks the same questions.
        tasks: of lm-eval, which then counts as one more measure, `lm_eval`.
        limit: the most questions of each of those.
        on_progress: called with (done, total, what); a total of 0 is not known.

    Each measure has a `status`: "done" with `result`, "skipped" with a `reason` if it cannot be
    applied to the model, or "failed" with an `error`. After a failure the others still run. After
    an interrupt (control-C) `measures` has those that were done before it, and `interrupted` is
    true.

    Raises UsageError and CheckpointError if a model or the text cannot be opened.
    """
    check_number("seed", seed, SEED, "evaluate")
    if limit is not None:
        check_number("limit", limit, COUNT, "evaluate")
    report = on_progress or (lambda done, total, message: None)
    chosen = choose(None, suite) if measures is None else tuple(measures)
    content = read_text(text)
    opening = opening or Opening(attention="sdpa")
    report(0, 0, "opening the model")
    subject = open_subject(model, opening)
    other = None
    if original is not None:
        report(0, 0, "opening the original")
        other = open_subject(original, opening)
    runner = Runner(subject, other)
    beside = None if other is None else Runner(other, subject)
    results: dict[str, Any] = {}
    interrupted = False
    for number, measure in enumerate(chosen):

        def tell(
            done: int, total: int, message: str, at: int = number, name: str = measure.name
        ) -> None:
            report(at, len(chosen), f"{name}: {message}{f' ({done} of {total})' if total else ''}")

        tell(0, 0, "starting")
        bench = Bench(runner, beside, content, seed, tell)
        try:
            results[measure.name] = _run(measure, bench)
        except KeyboardInterrupt:
            # keep the results so far, which took long to measure
            interrupted = True
            break
    if tasks and not interrupted:
        report(0, 0, f"lm-eval: {', '.join(tasks)}")
        bench = Bench(runner, beside, content, seed)
        results["lm_eval"] = _run(Harness.make({"tasks": list(tasks), "limit": limit or 0}), bench)
    report(len(chosen), len(chosen), "done")
    return {
        "model": subject.name,
        "original": None if other is None else other.name,
        "suite": suite,
        "seed": seed,
        "text": str(text) if isinstance(text, Path) else "sample" if text is None else "given",
        "dtype": {
            side: None if each is None else str(each.dtype).removeprefix("torch.")
            for side, each in (("model", subject), ("original", other))
        },
        "threads": torch.get_num_threads(),
        "passes": _passes(subject),
        "interrupted": interrupted,
        "measures": results,
        "seconds": sum(each["seconds"] for each in results.values()),
    }


def _run(measure: Measure, bench: Bench) -> dict[str, Any]:
    """Run one measure, and return its result or the reason why it has none."""
    start = time.perf_counter()
    try:
        outcome: dict[str, Any] = {"status": "done", "result": measure.run(bench)}
    except NotApplicable as reason:
        outcome = {"status": "skipped", "reason": str(reason)}
    except RerollError as error:
        outcome = {"status": "failed", "error": str(error)}
        log.debug("measure %s failed", measure.name, exc_info=True)
    # a model's own code raises errors of any type, and the other measures can still run
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        outcome = {"status": "failed", "error": f"{type(error).__name__}: {first}"}
        log.debug("measure %s failed", measure.name, exc_info=True)
    if outcome["status"] == "done":
        sides = [s for s in bench.sides if s in outcome["result"]]
        outcome["headline"] = {s: measure.headline(outcome["result"][s]) for s in sides}
    options = {key: getattr(measure, key) for key in measure.options()}
    return {**outcome, "options": options, "seconds": time.perf_counter() - start}


def _passes(subject: Subject) -> list[dict[str, Any]]:
    """List the passes of a converted model, each with its measurements."""
    steps = () if subject.program is None else subject.program.origin.steps
    return [{"pass": s.text, "seconds": s.seconds, "measured": dict(s.measured)} for s in steps]
