"""Define the commands: each parses options, calls the library, and passes the result to a report.

Libraries that take long to import are imported inside the commands, so that help is fast.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

import reroll
from reroll.bounds import BETWEEN, COUNT, COUNT_OR_NONE, POSITIVE, SEED, TOP_P, WINDOW
from reroll.cli import reports
from reroll.cli.options import Commands, integer, number
from reroll.cli.terminal import Bars, Load, Stopwatch, command, notes, write, write_json
from reroll.errors import UsageError

if TYPE_CHECKING:
    from reroll.rewrite.ir.program import Program
    from reroll.rewrite.pipeline.manager import Event, Measure

app = typer.Typer(
    cls=Commands,
    name="reroll",
    help="Rewrite a pretrained transformer into the loops that it is.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

MODEL_HELP = "A hub id, a directory, or a .gguf file."
Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="Compute in this dtype: float32, bfloat16, float16.", show_default="the model's own"
    ),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
]
Text = Annotated[
    Path | None, typer.Option(help="A file with text to measure on.", show_default="a short sample")
]
Attention = Annotated[
    Literal["eager", "sdpa"], typer.Option(help="transformers' attention for an original.")
]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"reroll {reroll.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Rewrite a pretrained transformer into the loops that it is."""


@app.command("inspect")
@command
def inspect_command(
    model: Model,
    check: Annotated[
        bool, typer.Option(help="Load the weights too, and compare with the model itself.")
    ] = True,
    dtype: Dtype = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    json_: Json = False,
) -> None:
    """Say which loops and which attention a model has, and whether its capture is exact."""
    from reroll.evaluate.inspect import inspect_model

    with Bars() as bars:
        found = inspect_model(
            model,
            check,
            dtype=dtype,
            revision=revision,
            trust_remote_code=trust_remote_code,
            on_progress=bars,
        )
    write_json(found) if json_ else reports.inspected(found)


@app.command()
@command
def convert(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to write.")],
    passes: Annotated[
        str | None,
        typer.Option(help="Passes, such as 'tie(blocks=10), relax(rank=64)'.", show_default="none"),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="A YAML file with passes, or the name of a recipe.")
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
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT if it exists.")
    ] = False,
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
    from reroll.cli.conversion import Conversion
    from reroll.rewrite.pipeline.pipeline import recipe_path

    recipe = None if recipe is None else recipe_path(recipe)
    read = [f for f in (recipe, text, *(load or ())) if f is not None]
    conversion = Conversion(out, overwrite=overwrite, sources=[model, *read])
    chosen = _pipeline(passes, recipe)
    content = None if text is None else _text(text)
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
            conversion.check(program.origin.paths)
        with watch.step("passes"):
            rewritten = reroll.run_passes(
                program,
                chosen,
                text=content,
                measure=_measure(measure),
                stop_after=_stop(stop_after),
                print_after="all" if "all" in (print_after or ()) else print_after or (),
                on_event=lambda event: _tell(event, bars),
                seed=seed,
            )
        with watch.step("save"):
            conversion.save(rewritten, bars)
    found = conversion.summary(model, program, rewritten, watch.seconds)
    write_json(found) if json_ else reports.converted(found, timing)


def _pipeline(passes: str | None, recipe: Path | None) -> Any:
    """Parse the requested passes, so that errors are raised before any long work."""
    if passes is not None and recipe is not None:
        raise UsageError("--passes and --recipe exclude each other", hint="give one of them")
    from reroll.rewrite.pipeline.pipeline import resolve

    return resolve(recipe if recipe is not None else passes or [])


def _text(path: Path) -> str:
    from reroll.evaluate.tokenizing import read_text

    return read_text(path)


def _measure(word: str) -> Measure:
    if word not in ("auto", "on", "off"):
        raise UsageError(f"--measure is auto, on or off, not {word!r}")
    return word  # type: ignore[return-value]


def _stop(word: str | None) -> int | str | None:
    return int(word) if word is not None and word.isdigit() else word


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


@app.command("export", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
@command
def export_command(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="OUT", help="A converted model, or any other.")],
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
    from reroll.cli.exporting import Export, exported

    export = Export(model, directory, target, ctx.args, overwrite=overwrite, load=load)
    with Bars() as bars:
        found = export.run(
            bars, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code
        )
    write_json(found) if json_ else exported(found)


@app.command("targets")
@command
def targets_command(
    name: Annotated[str | None, typer.Argument(help="One target, in full.")] = None,
    json_: Json = False,
) -> None:
    """List what models can be exported to, and the options of each target."""
    from reroll.cli.exporting import targets
    from reroll.export.targets import find, registered

    found = [t.describe() for t in ([find(name)] if name else registered().values())]
    write_json({"targets": found}) if json_ else targets(found)


@app.command("plugins")
@command
def plugins_command(json_: Json = False) -> None:
    """List passes, mixers, targets, stages and measures, and where each comes from."""
    from reroll.rewrite.pipeline.registry import registries

    found = [
        {"kind": registry.category, "name": name, "from": registry.origin(name)}
        for registry in registries()
        for name in registry.all()
    ]
    write_json({"plugins": found}) if json_ else reports.plugins(found)


@app.command("compare")
@command
def compare_command(
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
    from reroll.evaluate.compare import compare

    with Bars() as bars:
        found = compare(
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
    write_json(found) if json_ else reports.compared(found)


@app.command("generate")
@command
def generate_command(
    model: Annotated[str, typer.Argument(metavar="OUT", help="A converted model, or any other.")],
    prompt: Annotated[list[str], typer.Option(help="Text to continue. Repeatable: a batch.")],
    max_new_tokens: Annotated[int, integer(COUNT, "At most this many new tokens.")] = 64,
    temperature: Annotated[float | None, number(POSITIVE, "Sample, at this temperature.")] = None,
    top_k: Annotated[int | None, integer(COUNT, "Sample from the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, number(TOP_P, "Sample from this share of likelihood.")] = None,
    beams: Annotated[int, integer(COUNT, "Beams of a beam search.")] = 1,
    seed: Annotated[int, integer(SEED, "For sampling.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Use the chat template.")] = False,
    read_twice: Annotated[
        bool,
        typer.Option(
            "--read-twice", help="Read each prompt twice: recurrent models recall better."
        ),
    ] = False,
    dtype: Dtype = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    json_: Json = False,
) -> None:
    """Continue prompts. Greedy unless an option for sampling is given."""
    from reroll.evaluate.generation import generate, open_generator
    from reroll.evaluate.subjects import Opening

    with Bars() as bars:
        bars(0, 0, "opening the model")
        opening = Opening(dtype, revision=revision, trust_remote_code=trust_remote_code)
        module, tokenizer = open_generator(model, opening)
        bars(0, 0, "generating")
        found = generate(
            module,
            tokenizer,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            beams=beams,
            seed=seed,
            chat=chat,
            read_twice=read_twice,
        )
    found = {"model": model, **found}
    write_json(found) if json_ else reports.generated(found)


@app.command("calibrate")
@command
def calibrate_command(
    model: Annotated[str, typer.Argument(metavar="OUT", help="A converted model with exits.")],
    text: Annotated[Path, typer.Option(help="A file with text to calibrate on.")],
    risk: Annotated[
        float, number(BETWEEN, "The part of tokens that may differ from the full depth.")
    ] = 0.05,
    confidence: Annotated[float, number(BETWEEN, "With which that has to hold.")] = 0.95,
    max_tokens: Annotated[int, integer(COUNT, "Use at most so many tokens.")] = 4096,
    json_: Json = False,
) -> None:
    """Choose the thresholds of a model's exits on text, and write them into the model."""
    from reroll.evaluate.exits import calibrate
    from reroll.evaluate.tokenizing import plain_ids, tokenizer_of

    program = reroll.load(model)
    tokenizer = tokenizer_of(program)
    if tokenizer is None:
        raise UsageError("the model has no tokenizer", where=model)
    ids = plain_ids(tokenizer, _text(text)[: 16 * max_tokens])[:max_tokens]
    with Bars() as bars:
        result, found = calibrate(program, ids, risk=risk, confidence=confidence, progress=bars)
        bars(0, 0, f"writing {model}")
        result.save(model, overwrite=True)
    data = {"model": model, **found.as_data()}
    write_json(data) if json_ else reports.calibrated(data)


@app.command("passes")
@command
def passes_command(
    name: Annotated[str | None, typer.Argument(help="One pass, in full.")] = None,
    json_: Json = False,
) -> None:
    """List the passes, their options and their contracts."""
    from reroll.rewrite.pipeline.base import PASSES

    found = [p.describe() for p in ([PASSES.find(name)] if name else PASSES.all().values())]
    if json_:
        write_json({"passes": found})
    elif name:
        reports.one_pass(found[0])
    else:
        reports.passes(found)


@app.command("diff")
@command
def diff_command(
    a: Annotated[
        str, typer.Argument(metavar="A", help="A model, or a file with a program's text.")
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    context: Annotated[int, integer(COUNT_OR_NONE, "Lines around each change.")] = 3,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    json_: Json = False,
) -> None:
    """Say how the program of B differs from that of A. Exits with 1 if it does, as diff does."""
    from reroll.rewrite.ir.text.compare import diff

    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    with Bars() as bars:
        bars(0, 2, f"opening {a}")
        before = program_of(a, **options)
        bars(1, 2, f"opening {b}")
        after = program_of(b, **options)
    text = diff(before, after, context=context)
    if json_:
        write_json({"a": a, "b": b, "same": not text, "diff": text.splitlines()})
    elif text:
        write(text)
    else:
        notes().print("the programs are the same")
    if text:
        raise typer.Exit(1)


def program_of(name: str, **options: Any) -> Program:
    """The Program of a model, or of a file with a program's text."""
    path = Path(name)
    if path.is_file() and path.suffix != ".gguf":
        try:
            return reroll.parse(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError("this is not the text of a program", where=name) from error
    return reroll.capture(name, **options)


def main() -> None:
    """Run the command line."""

    # SIGTERM acts like control-C, so that temporary files are removed
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    sys.exit(app(prog_name="reroll"))
