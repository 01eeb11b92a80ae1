"""Pass manager: runs passes in order, and checks or measures the result of each."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from reroll.bounds import NOT_NEGATIVE, SEED, check_number
from reroll.errors import PassError, RerollError, UsageError
from reroll.rewrite.analysis.context import LARGE, Context
from reroll.rewrite.analysis.program_distance import Measurer, Violation, difference, size
from reroll.rewrite.analysis.samples import Tokenizer
from reroll.rewrite.ir.hidden import keep_complete
from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.records import Step
from reroll.rewrite.pipeline.base import Pass
from reroll.rewrite.pipeline.pipeline import Pipeline, resolve

log = logging.getLogger(__name__)

# as on the command line, or as in Python
Measure = Literal["auto", "on", "off"] | bool


@dataclass(frozen=True)
class Event:
    """Event of a running pipeline, for the caller's callback.

    `kind` is "start", "progress" (with `done`, `total` and `what`), "done" (with `step` and
    `program`) or "print" (show `program`).
    """

    kind: Literal["start", "progress", "done", "print"]
    text: str
    number: int
    count: int
    program: Program | None = None
    step: Step | None = None
    done: int = 0
    total: int = 0
    what: str = ""


def run_passes(
    program: Program,
    passes: Pipeline,
    *,
    text: str | Path | None = None,
    tokenizer: Tokenizer | None = None,
    measure: Measure = "auto",
    stop_after: int | str | None = None,
    print_after: Collection[str] | Literal["all"] = (),
    on_event: Callable[[Event], None] | None = None,
    seed: int = 0,
    large: int = LARGE,
) -> Program:
    """Run passes on a Program; each adds a Step to the result's origin.

    Args:
        program: the Program to rewrite; it is not changed.
        passes: pipeline text, the path of a recipe, a pass, or a list of these.
        text: calibration text, or a file with it; a sample ships with reroll.
        tokenizer: turns text into token ids; the original model's own by default.
        measure: "auto" checks exact passes and measures approximate ones unless the weights are
            larger than `large` bytes; True or "on" does so in any case, False or "off" does not.
        stop_after: the number or the name of the last pass to run.
        print_after: names of passes after which the program is shown, or "all".
        on_event: called with each Event: starts, progress, steps and programs to show.
        seed: for passes that need random numbers.
        large: bytes of weights above which "auto" neither checks nor measures.

    Raises UsageError if the pipeline is not valid. Raises PassError with the pass's name if a pass
    fails, returns a malformed program, or claims to be exact and is not.
    """
    check_number("seed", seed, SEED, "run_passes")
    check_number("large", large, NOT_NEGATIVE, "run_passes", integer=False)
    if measure not in (True, False, "auto", "on", "off"):
        raise UsageError(f'measure must be "auto", True or False, not {measure!r}', "run_passes")
    if measure in ("on", "off"):
        measure = measure == "on"
    if not (text is None or isinstance(text, str | Path)):
        raise UsageError(f"text must be text or the Path of a file, not {text!r:.40}", "run_passes")
    chosen = _stopped(resolve(passes), stop_after)
    _check_requirements(program, chosen)
    context = Context(
        text_source=text,
        tokenizer=tokenizer,
        seed=seed,
        large=large,
        measuring=measure is not False,
    )
    if chosen:
        # it is a draft of what was
        program = replace(program, draft=None)
    runner = _Runner(context, program, measure, on_event, len(chosen))
    for number, each in enumerate(chosen, 1):
        program = runner.run(number, each, program)
        if print_after == "all" or each.name in print_after:
            runner.show(number, each, program)
    return program


def _stopped(passes: tuple[Pass, ...], stop_after: int | str | None) -> tuple[Pass, ...]:
    if stop_after is None:
        return passes
    if (
        isinstance(stop_after, int)
        and not isinstance(stop_after, bool)
        and 0 <= stop_after <= len(passes)
    ):
        return passes[:stop_after]
    for number, each in enumerate(passes, 1):
        if each.name == stop_after:
            return passes[:number]
    names = ", ".join(p.name for p in passes)
    raise UsageError(f"cannot stop after {stop_after!r}", hint=f"the passes are {names}")


def _check_requirements(program: Program, passes: tuple[Pass, ...]) -> None:
    """Check the requirements of all passes before the first runs, because a pass may take hours."""
    ran = {step.text.partition("(")[0] for step in program.origin.steps}
    for each in passes:
        missing = [name for name in each.requires if name not in ran]
        if missing:
            raise PassError(
                f"{each.name} needs {' and '.join(missing)} to have run before it",
                where=str(each),
                hint=f"for example: {', '.join([*missing, each.name])}",
            )
        ran.add(each.name)


class _Runner:
    """State of one run of a pipeline, shared by its passes."""

    def __init__(
        self,
        context: Context,
        original: Program,
        measure: Measure,
        on_event: Callable[[Event], None] | None,
        count: int,
    ) -> None:
        self.context = context
        self.original = original
        self.measure = measure
        self.on_event = on_event
        self.count = count
        self.measurer: Measurer | None = None

    def run(self, number: int, each: Pass, program: Program) -> Program:
        text = str(each)
        self.tell(Event("start", text, number, self.count))
        self.context.remarks = []
        self.context.report_progress = lambda done, total, detail: self.tell(
            Event("progress", text, number, self.count, done=done, total=total, what=detail)
        )
        start = time.perf_counter()
        after = _guarded(each, program, self.context)
        keep_complete(after, program)
        seconds = time.perf_counter() - start
        measured = {**_changes(size(program), size(after)), **self.quality(each, program, after)}
        step = Step(text, seconds, tuple(self.context.remarks), measured)
        steps = (*program.origin.steps, step)
        result = replace(after, origin=replace(after.origin, steps=steps))
        if self.measurer is not None:
            self.measurer.renamed(after, result)
            self.measurer.keep([self.original, result])
        log.info("%s", summary(step))
        self.tell(Event("done", text, number, self.count, program=result, step=step))
        return result

    def quality(self, each: Pass, before: Program, after: Program) -> dict[str, Any]:
        """Check an exact pass, or measure an approximate one."""
        looked_at = (before, after) if each.contract == "exact" else (self.original, before, after)
        skipped = any(map(self.context.is_large, looked_at))
        if self.measure is not True and skipped:
            verb = "checked" if each.contract == "exact" else "measured"
            self.context.remark(
                f"not {verb}: the weights are larger than {self.context.large / 2**30:.3g} GiB"
            )
            return {}
        if each.contract == "exact":
            return {"relative_rms_error": _checked(each, before, after)}
        if self.measure is False:
            return {}
        self.measurer = self.measurer or Measurer(self.original, self.context)
        quality = {"previous": self.measurer.compare(before, after)}
        quality["original"] = (
            quality["previous"]
            if before is self.original
            else self.measurer.compare(self.original, after)
        )
        return {"quality": quality}

    def show(self, number: int, each: Pass, program: Program) -> None:
        if self.on_event is None:
            log.info("after %s:\n%s", each, program)
        self.tell(Event("print", str(each), number, self.count, program=program))

    def tell(self, event: Event) -> None:
        if self.on_event is not None:
            self.on_event(event)


def _guarded(each: Pass, program: Program, context: Context) -> Program:
    """Run one pass on a copy and verify its result; every error names the pass."""
    try:
        after = each.run(program.edit(), context)
    except RerollError as error:
        raise _blamed(each, error) from error
    except Exception as error:
        raise PassError(f"the pass failed: {type(error).__name__}: {error}", str(each)) from error
    if not isinstance(after, Program):
        raise PassError(f"the pass returned {type(after).__name__}, not a Program", str(each))
    try:
        _verify(after)
    except RerollError as error:
        hint = "this is a defect of the pass"
        raise PassError(f"the pass gave a malformed program: {error}", str(each), hint) from error
    return after


def _blamed(each: Pass, error: RerollError) -> PassError:
    where = str(each) if error.where is None else f"{each}: {error.where}"
    return PassError(error.message, where, error.hint)


def _verify(program: Program) -> None:
    try:
        from reroll.rewrite.ir.verify import verify
    except ImportError:
        for _, graph in program.graphs():
            graph.lint()
    else:
        verify(program)


def _checked(each: Pass, before: Program, after: Program) -> float:
    outcome = difference(before, after)
    if isinstance(outcome, Violation):
        raise PassError(
            f"the pass claims to be exact, but {outcome.output} differs by a relative RMS error of "
            f"{outcome.error:.3g} (tolerance {outcome.tolerance:.3g})",
            where=str(each),
            hint="this is a defect of the pass",
        )
    return outcome


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two nested measurements into one with "before" and "after" in its leaves."""
    return {
        key: _changes(value, after[key])
        if isinstance(value, Mapping)
        else {"before": value, "after": after[key]}
        for key, value in before.items()
    }


def summary(step: Step) -> str:
    """Summarise a step in one line: what it changed, and its distance from before."""
    parts = [f"{step.seconds:.1f} s"]
    for key, unit in (("parameters", "parameters"), ("flops_per_token", "FLOPs per token")):
        change = step.measured[key]
        if change["before"] != change["after"]:
            parts.append(f"{change['before']:,} -> {change['after']:,} {unit}")
    if "relative_rms_error" in step.measured:
        parts.append(f"relative RMS error {step.measured['relative_rms_error']:.2g}")
    quality = step.measured.get("quality", {}).get("previous", {})
    if "kl" in quality:
        parts.append(f"KL {quality['kl']:.3g}, top-1 agreement {quality['top1_agreement']:.1%}")
    if "perplexity" in quality:
        change = quality["perplexity"]
        parts.append(f"perplexity {change['before']:.4g} -> {change['after']:.4g}")
    return f"{step.text}: {'; '.join(parts)}"
