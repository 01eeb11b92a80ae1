"""Define the commands `compare` and `evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from reroll.bounds import COUNT, COUNT_OR_NONE, SEED, WINDOW
from reroll.cli.command import command
from reroll.cli.options import (
    MODEL_HELP,
    Attention,
    Dtype,
    Json,
    Model,
    Revision,
    Text,
    Trust,
    integer,
)
from reroll.cli.tables import Found, format_number, format_size, new_table
from reroll.cli.terminal import Bars, write, write_json
from reroll.evaluate import pages


@command
def compare(
    a: Annotated[str, typer.Argument(metavar="MODEL", help="The original. " + MODEL_HELP)],
    b: Annotated[str, typer.Argument(metavar="OUT", help="What it became, or any other model.")],
    text: Text = None,
    length: Annotated[
        int | None,
        integer(
            WINDOW,
            "Tokens in one window of the text.",
            show_default="512, or as many as the models have positions for",
        ),
    ] = None,
    max_tokens: Annotated[
        int, integer(COUNT_OR_NONE, "No more tokens of the text than this, 0 for all.")
    ] = 8192,
    batch: Annotated[int, integer(COUNT, "Windows that run at once.")] = 4,
    dtype: Dtype = None,
    attention: Attention = "eager",
    revision: Revision = None,
    trust_remote_code: Trust = False,
    json_: Json = False,
) -> None:
    """Measure how far one model is from another, on text."""
    from reroll.evaluate.compare import compare as run

    with Bars() as bars:
        found = run(
            a,
            b,
            text,
            length=length,
            max_tokens=max_tokens or None,
            batch=batch,
            dtype=dtype,
            attention=attention,
            revision=revision,
            trust_remote_code=trust_remote_code,
            on_progress=bars,
        )
    write_json(found) if json_ else _print_comparison(found)


def _print_comparison(found: Found) -> None:
    inputs = found["inputs"]
    on = inputs["kind"]
    if on == "text":
        source = "the sample text" if inputs["text"] == "sample" else inputs["text"]
        on = f"{source}, {inputs['windows']} windows of {inputs['length']} tokens"
        on += ", the text goes on" if inputs["cut"] else ""
    dtype = found["dtype"]
    write(f"a: {found['a']} ({dtype['a']})", f"b: {found['b']} ({dtype['b']})", f"on {on}")
    table = new_table("", ">a", ">b", ">b / a")
    rows: list[tuple[str, Found | None, Any]] = [
        ("perplexity", found["perplexity"], format_number),
        ("parameters", found["parameters"], format_number),
        ("weights", found["bytes"], format_size),
        ("FLOPs per token", found["flops_per_token"], format_number),
    ]
    for context, sides in (found["state_bytes"] or {}).items():
        rows.append((f"state at {int(context):,} tokens", sides, format_size))
    for label, sides, shown in rows:
        if sides is not None:
            a, b = sides["a"], sides["b"]
            table.add_row(label, shown(a), shown(b), f"{b / a:.3f}" if a and b is not None else "-")
    apart = new_table(f"distance of {found['output']}", ">")
    for label, key, digits in (
        ("KL divergence (nats)", "kl", ".3g"),
        ("top-1 agreement", "top1_agreement", ".2%"),
        ("relative RMS error", "relative_rms_error", ".3g"),
        ("largest error", "max_abs_error", ".3g"),
    ):
        if found[key] is not None:
            apart.add_row(label, format(found[key], digits))
    write(table, apart)


@command
def evaluate(
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
    from reroll.evaluate.suite import choose
    from reroll.evaluate.suite import evaluate as run

    # all arguments are checked before a model is opened
    chosen = choose(measures, suite)  # type: ignore[arg-type]
    tasks = [] if lm_eval is None else check_tasks(lm_eval)
    if tasks and measures is None:
        chosen = ()
    if html is not None:
        read = [p for p in (model, against, text) if p is not None]
        report.check_page(html, read)
    with Bars() as bars:
        found = run(
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
    write_json(found) if json_ else _print_evaluation(found, html)
    if found["interrupted"]:
        raise KeyboardInterrupt
    if any(each["status"] == "failed" for each in found["measures"].values()):
        raise typer.Exit(1)


def _print_evaluation(found: Found, page: Path | None) -> None:
    from reroll.evaluate.report import problems, rows

    beside = found["original"] is not None
    heads = ["measure", "", ">model", *([">original", ">ratio"] if beside else [])]
    title = f"{found['model']}, {found['suite']} suite, {found['seconds']:.0f} s"
    table = new_table(*heads, title=escape(title))
    before = None
    for row in rows(found):
        values = [row.model, row.original, row.ratio] if beside else [row.model]
        name = "" if row.measure == before else row.measure
        table.add_row(escape(name), escape(row.label), *map(pages.number, values))
        before = row.measure
    write(table)
    for name, status, reason in problems(found):
        write(f"{name} {status}: {reason}")
    if page is not None:
        write(f"wrote {page}")
