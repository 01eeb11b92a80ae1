"""Define number options with a range, and report command-line options that cannot be read."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from reroll.bounds import Range, problem_with
from reroll.cli.terminal import report_error


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


class Commands(TyperGroup):
    """Group of commands that reports unreadable options like all other errors."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except TyperException as error:
            within: Any = getattr(error, "ctx", None) or ctx
            report_error(
                error.format_message(),
                within.command_path,
                f"{within.command_path} --help shows the options",
            )
            raise typer.Exit(error.exit_code) from None
