"""Declare the options that commands share, and number options with a range."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from reroll.bounds import Range, problem_with

# ---- which model, and how it is opened

MODEL_HELP = "A hub id, a directory, or a .gguf file."
Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)]
AnyModel = Annotated[str, typer.Argument(metavar="OUT", help="A converted model, or any other.")]
WithExits = Annotated[str, typer.Argument(metavar="OUT", help="A converted model with exits.")]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="Compute in this dtype: float32, bfloat16, float16.", show_default="the model's own"
    ),
]
Attention = Annotated[
    Literal["eager", "sdpa"], typer.Option(help="transformers' attention for an original.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
]
Text = Annotated[
    Path | None, typer.Option(help="A file with text to measure on.", show_default="a short sample")
]

# ---- what is written

Out = Annotated[Path, typer.Argument(metavar="OUT", help="The directory to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]

# ---- of every command

Load = Annotated[
    list[Path] | None,
    typer.Option(
        help="A Python file with passes, mixers, targets, stages or measures; it is run. "
        "Repeatable.",
        show_default=False,
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Log everything, and show tracebacks.")]

# ---- numbers


def integer(within: Range, help: str, **options: Any) -> Any:
    """Declare an option that is an integer in a range."""
    return _number(within, help, True, options)


def number(within: Range, help: str, **options: Any) -> Any:
    """Declare an option that is a number in a range."""
    return _number(within, help, False, options)


def _number(within: Range, help: str, integer: bool, options: dict[str, Any]) -> Any:
    def parse(text: object) -> int | float:
        found: object = text
        # text that is no number is reported as it was given
        if isinstance(text, str):
            try:
                found = int(text) if integer else float(text)
            except ValueError:
                found = text
        if problem := problem_with(found, within, integer=integer):
            raise ValueError(f"must be {problem}, not {text!s:.40}")
        return found  # type: ignore[return-value]

    return typer.Option(
        parser=parse,
        metavar="INTEGER" if integer else "NUMBER",
        help=f"{help.removesuffix('.')}: {within}.",
        **options,
    )
