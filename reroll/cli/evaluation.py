"""Define the command `evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reroll.bounds import COUNT, SEED
from reroll.cli import reports
from reroll.cli.app import Attention, Dtype, Json, Model, Revision, Text, Trust, app
from reroll.cli.options import integer
from reroll.cli.terminal import Bars, command, write_json


@app.command("evaluate")
@command
def evaluate_command(
    model: Model,
    against: Annotated[
        str | None, typer.Option(metavar="ORIGINAL", help="Measure this model beside it.")
    ] = None,
    suite: Annotated[str, typer.Option(help="quick or full.")] = "quick",
    measures: Annotated[
        str | None,
        typer.Option(help="Measures, such as 'perplexity, recall(samples=2)'.", show_default="all"),
    ] = None,
    text: Text = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with plots here.")] = None,
    lm_eval: Annotated[
        str | None,
        typer.Option(metavar="TASKS", help="Tasks of lm-eval, with commas between them."),
    ] = None,
    limit: Annotated[
        int | None, integer(COUNT, "With --lm-eval: questions of each task at most.")
    ] = None,
    attention: Attention = "sdpa",
    seed: Annotated[int, integer(SEED, "Of all random questions.")] = 0,
    dtype: Dtype = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    json_: Json = False,
) -> None:
    """Measure a model: perplexity, agreement, generation, recall, state tracking, speed, cost.

    With --lm-eval alone only those tasks run; with --measures too, both do.
    """
    from reroll.evaluate import report
    from reroll.evaluate.harness import check_tasks
    from reroll.evaluate.subjects import Opening
    from reroll.evaluate.suite import choose, evaluate

    # all arguments are checked before a model is opened
    chosen = choose(measures, suite)  # type: ignore[arg-type]
    tasks = [] if lm_eval is None else check_tasks(lm_eval)
    if tasks and measures is None:
        chosen = ()
    if html is not None:
        read = [p for p in (model, against, text) if p is not None]
        report.check_page(html, read)
    with Bars() as bars:
        found = evaluate(
            model,
            against,
            chosen,
            suite=suite,  # type: ignore[arg-type]
            text=text,
            opening=Opening(dtype, attention, revision, trust_remote_code),
            seed=seed,
            tasks=tasks,
            limit=limit,
            on_progress=bars,
        )
    if html is not None:
        report.write_page(found, html)
    write_json(found) if json_ else reports.evaluated(found, html)
    if found["interrupted"]:
        raise KeyboardInterrupt
    if any(each["status"] == "failed" for each in found["measures"].values()):
        raise typer.Exit(1)
