"""Run EleutherAI's lm-evaluation-harness (`lm_eval`) on a subject, if it is installed.

Every model that reroll saves also works with its own command: see docs/evaluate.md.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from reroll.bounds import COUNT_OR_NONE
from reroll.errors import RerollError, UsageError
from reroll.evaluate.measure import Bench, Measure
from reroll.evaluate.subjects import Subject
from reroll.rewrite.pipeline.options import option


def check_tasks(text: str) -> list[str]:
    """Split a comma-separated list of tasks; raises UsageError if empty or without lm-eval."""
    tasks = [t.strip() for t in text.split(",") if t.strip()]
    if not tasks:
        raise UsageError("no task is named", where="--lm-eval", hint="lm_eval ls tasks lists them")
    need_harness()
    return tasks


def need_harness() -> None:
    """Raise UsageError if lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError("lm-eval is not installed", hint='pip install "reroll[lm-eval]"')


class Harness(Measure):
    """Requested tasks of lm-eval."""

    name = "lm_eval"

    tasks: list[str] = option(help="lm-eval's names")
    limit: int = option(0, within=COUNT_OR_NONE, help="the most questions of each; 0 for all")

    def run(self, bench: Bench) -> dict[str, Any]:
        return {
            side: harness(runner.subject, self.tasks, limit=self.limit or None, seed=bench.seed)
            for side, runner in bench.sides.items()
        }

    def headline(self, result: Mapping[str, Any]) -> dict[str, float | int | None]:
        return {f"{task}: {k}": v for task, metrics in result.items() for k, v in metrics.items()}


def harness(
    subject: Subject,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch: int = 4,
    seed: int = 0,
    manager: Any | None = None,
) -> dict[str, Any]:
    """Run lm-eval's tasks, and return each task's metrics as JSON data.

    `limit` is the most questions of each task, and `manager` a TaskManager of lm-eval with further
    tasks. Raises UsageError for a model without a tokenizer or a task that lm-eval does not know,
    and RerollError for any other error of lm-eval.
    """
    check_tasks(",".join(tasks))
    if subject.tokenizer is None or not subject.generates:
        raise UsageError(
            "lm-eval needs a model that predicts text, and its tokenizer", where=subject.name
        )
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = manager or TaskManager()
    unknown = [t for t in tasks if t not in manager.all_tasks]
    if unknown:
        raise UsageError(
            f"lm-eval has no task {unknown[0]!r}",
            where="--lm-eval",
            hint="lm_eval ls tasks lists them",
        )
    try:
        results = simple_evaluate(
            model=HFLM(
                pretrained=subject.model,
                tokenizer=subject.tokenizer,
                backend="causal",
                batch_size=batch,
            ),
            tasks=list(tasks),
            limit=limit,
            task_manager=manager,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            bootstrap_iters=0,
        )
    # unreachable data sets raise errors of many types
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise RerollError(
            f"lm-eval stopped: {type(error).__name__}: {reason}",
            where=", ".join(tasks),
            hint="most tasks download their data from the hub when they first run",
        ) from error
    return {name: _metrics(values) for name, values in results["results"].items()}


def _metrics(values: Mapping[str, Any]) -> dict[str, Any]:
    """Collect the metrics of one task by lm-eval's names, with the filter where there is one."""
    metrics = {}
    for name, value in values.items():
        metric, _, chosen = name.partition(",")
        if isinstance(value, int | float) and not metric.endswith("_stderr"):
            metrics[metric if chosen in ("", "none") else name] = value
    return metrics
