"""Define the commands `convert` and `export`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

import reroll
from reroll.bounds import SEED
from reroll.cli.command import command
from reroll.cli.options import (
    AnyModel,
    Dtype,
    Json,
    Load,
    Model,
    Out,
    Overwrite,
    Revision,
    Text,
    Trust,
    integer,
)
from reroll.cli.tables import Found, format_number, format_size, new_table
from reroll.cli.terminal import Bars, Stopwatch, write, write_json
from reroll.errors import ExportError, UsageError
from reroll.writing import check_directory, file_sizes, new_directory

if TYPE_CHECKING:
    from reroll.rewrite.ir.program import Program
    from reroll.rewrite.pipeline.manager import Event, Measure


@command
def convert(
    model: Model,
    out: Out,
    passes: Annotated[
        str | None,
        typer.Option(help="Passes, such as 'tie(blocks=10), relax(rank=64)'.", show_default="none"),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="A YAML file with passes, or the name of a recipe.")
    ] = None,
    draft: Annotated[
        str | None,
        typer.Option(help="Save a draft beside the model: passes that make it of the result."),
    ] = None,
    text: Text = None,
    measure: Annotated[
        str, typer.Option(help="auto, on or off: measure what each pass does.")
    ] = "auto",
    dtype: Dtype = None,
    load: Load = None,
    print_after: Annotated[
        list[str] | None,
        typer.Option(
            help="Print the program after this pass, or 'all'. Repeatable.", show_default=False
        ),
    ] = None,
    stop_after: Annotated[
        str | None,
        typer.Option(help="Stop after this many passes, or after the pass of this name."),
    ] = None,
    timing: Annotated[
        bool, typer.Option("--timing", help="Print how long each step took.")
    ] = False,
    overwrite: Overwrite = False,
    seed: Annotated[int, integer(SEED, "For passes that use random numbers.")] = 0,
    pictures: Annotated[
        bool, typer.Option("--pictures", help="Convert what a vision-language model sees too.")
    ] = False,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    json_: Json = False,
) -> None:
    """Capture a model, run passes on it, and write a Hugging Face directory.

    Without passes, the model is rolled and computes the same.
    """
    from reroll.evaluate.tokenizing import read_text
    from reroll.rewrite.pipeline.pipeline import recipe_path, resolve

    # what is read and written is checked before the model is opened
    recipe = None if recipe is None else recipe_path(recipe)
    read = [f for f in (recipe, text, *(load or ())) if f is not None]
    check_directory(out, overwrite=overwrite, sources=[model, *read])
    if passes is not None and recipe is not None:
        raise UsageError("--passes and --recipe exclude each other", hint="give one of them")
    chosen = resolve(recipe if recipe is not None else passes or [])
    draft_passes = None if draft is None else resolve(draft)
    content = None if text is None else read_text(text)
    watch = Stopwatch()
    with Bars() as bars:
        with watch.step("capture"):
            bars(0, 0, "capturing")
            program = reroll.capture(
                model,
                dtype=dtype,
                pictures=pictures,
                revision=revision,
                trust_remote_code=trust_remote_code,
            )
            check_directory(out, overwrite=overwrite, sources=program.origin.paths)
        with watch.step("passes"):
            rewritten = reroll.run_passes(
                program,
                chosen,
                text=content,
                measure=_measure(measure),
                stop_after=int(stop_after) if stop_after and stop_after.isdigit() else stop_after,
                print_after="all" if "all" in (print_after or ()) else print_after or (),
                on_event=lambda event: _tell(event, bars),
                seed=seed,
            )
        if draft_passes is not None:
            with watch.step("draft"):
                bars(0, 0, "making the draft")
                twin = rewritten.twin(list(draft_passes), text=content, seed=seed)
                rewritten = rewritten.with_draft(twin)
        with watch.step("save"):
            rewritten.save(
                str(out),
                overwrite=overwrite,
                progress=lambda done, total: bars(done, total, f"writing {out}"),
            )
    found = _summary(model, out, program, rewritten, watch.seconds)
    write_json(found) if json_ else _print_conversion(found, timing)


def _measure(word: str) -> Measure:
    if word not in ("auto", "on", "off"):
        raise UsageError(f"--measure is auto, on or off, not {word!r}")
    return word  # type: ignore[return-value]


def _tell(event: Event, bars: Bars) -> None:
    """Show an event of the pass manager."""
    if event.kind == "start":
        bars(0, 0, event.text)
    elif event.kind == "progress":
        bars(event.done, event.total, f"{event.text}: {event.what}")
    elif event.kind == "print":
        bars.print(f"# after {event.text}\n{event.program}")
    elif event.step is not None:
        from reroll.rewrite.pipeline.manager import summary

        bars.print(summary(event.step))
        for remark in event.step.remarks:
            bars.print(f"  {remark}")


def _summary(
    model: str, out: Path, before: Program, after: Program, seconds: Mapping[str, float]
) -> dict[str, Any]:
    """Summarise the conversion as JSON data: sizes, costs, loops, passes, files."""
    from reroll.rewrite.analysis.program_distance import size

    old, new = size(before), size(after)
    counts = ("parameters", "bytes", "flops_per_token")
    steps = after.origin.steps[len(before.origin.steps) :]
    return {
        "model": model,
        "out": str(out),
        **{name: {"before": old[name], "after": new[name]} for name in counts},
        "state_bytes": {
            context: {"before": count, "after": new["state_bytes"][context]}
            for context, count in old["state_bytes"].items()
        },
        "loops": [
            {"name": p.name, "trips": p.trips, "period": p.period, "layers": p.layers}
            for p in after.loops
        ],
        "passes": [
            {
                "pass": step.text,
                "seconds": step.seconds,
                "remarks": list(step.remarks),
                "measured": dict(step.measured),
            }
            for step in steps
        ],
        **({} if after.draft is None else {"draft": _draft_summary(after, after.draft)}),
        "remarks": list(after.origin.remarks),
        "files": file_sizes(out),
        "seconds": {**seconds, "total": sum(seconds.values())},
    }


def _draft_summary(program: Program, draft: Program) -> dict[str, Any]:
    """Say how a draft was made, and the bytes of the weights that it has beside the program's."""
    from reroll.rewrite.ir.drafts import added_bytes

    steps = draft.origin.steps[len(program.origin.steps) :]
    return {"passes": [s.text for s in steps], "added_bytes": added_bytes(program, draft)}


def _print_conversion(found: Found, timing: bool) -> None:
    """Print the sizes and costs before and after."""
    table = new_table("", ">before", ">after", ">ratio")
    _add_change(table, "parameters", found["parameters"], format_number)
    _add_change(table, "weights", found["bytes"], format_size)
    _add_change(table, "FLOPs per token", found["flops_per_token"], format_number)
    for context, change in found["state_bytes"].items():
        if change["before"] or change["after"]:
            _add_change(table, f"state at {int(context):,} tokens", change, format_size)
    write(table)
    if timing:
        times = new_table("step", ">seconds")
        for name, seconds in found["seconds"].items():
            if name != "total":
                times.add_row(name, f"{seconds:.2f}")
            if name == "passes":
                for step in found["passes"]:
                    times.add_row(escape(f"  {step['pass']}"), f"{step['seconds']:.2f}")
        times.add_row("total", f"{found['seconds']['total']:.2f}")
        write(times)
    write(*found["remarks"])
    if "draft" in found:
        made, added = ", ".join(found["draft"]["passes"]), found["draft"]["added_bytes"]
        write(f"with a draft: {made}; it adds weights of {format_size(added)}")
    write(f"wrote {found['out']}: {format_size(sum(found['files'].values()))}")


def _add_change(table: Table, label: str, change: Found, shown: Any) -> None:
    before, after = change["before"], change["after"]
    ratio = f"{after / before:.3f}" if before else "-"
    table.add_row(label, shown(before), shown(after), ratio)


# ---- export


@command
def export(
    ctx: typer.Context,
    model: AnyModel,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The directory to write.")],
    target: Annotated[str, typer.Option(help="What to export to: see `reroll targets`.")] = "onnx",
    load: Load = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace DIR if it exists.")
    ] = False,
    dtype: Dtype = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    json_: Json = False,
) -> None:
    """Write a model for another runtime. A target has options of its own: see `reroll targets`.

    The directory appears whole or not at all; if a check fails, there is none.
    """
    from reroll.export.targets import find
    from reroll.rewrite.capture.pictures import picture_inputs

    # all arguments are checked before the model is opened
    chosen = find(target).parse(ctx.args)
    check_directory(directory, overwrite=overwrite, sources=[model, *(load or ())])
    with Bars() as bars:
        start = time.perf_counter()
        bars(0, 0, "capturing")
        program = reroll.capture(
            model, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code
        )
        captured = time.perf_counter() - start
        if pictures := picture_inputs(program.inputs):
            raise ExportError(
                f"{pictures[0]} cannot be exported",
                where=model,
                hint="convert the original without its pictures, and export that",
            )
        sources = program.origin.paths
        with new_directory(directory, overwrite=overwrite, sources=sources) as temporary:
            told = chosen.write(program, temporary, bars)
    seconds = {"capture": captured, **told.pop("seconds", {})}
    found = {
        "source": model,
        "out": str(directory),
        "target": chosen.name,
        **told,
        "sizes": file_sizes(directory),
        "seconds": {**seconds, "total": time.perf_counter() - start},
    }
    write_json(found) if json_ else _print_export(found)


def _print_export(found: Found) -> None:
    """Print what was written, and how far from the original it is."""
    rows = new_table("file", ">size")
    for name, count in found["sizes"].items():
        rows.add_row(name, format_size(count))
    write(rows)
    for kind, graph in found.get("graphs", {}).items():
        if check := graph.get("check"):
            error, most = check["relative_rms_error"], check["tolerance"]
            write(
                f"{kind}: checked, relative RMS error {format_number(error)} "
                f"of at most {format_number(most)}"
            )
    write(f"{found['out']} written in {format_number(found['seconds']['total'])} s")
