"""Assemble the commands, and run the command line.

Each group of commands is one file: options, what is called, and what is printed. Libraries that
take long to import are imported inside the commands, so that help is fast.
"""

from __future__ import annotations

import signal
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

import reroll
from reroll.cli.command import report_error
from reroll.cli.converting import convert, export
from reroll.cli.evaluating import compare, evaluate
from reroll.cli.generating import calibrate, generate, serve_bench
from reroll.cli.inspecting import inspect
from reroll.cli.listing import passes, plugins, targets
from reroll.cli.recovering import recover, sample
from reroll.cli.showing import diff, show


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


app = typer.Typer(
    cls=Commands,
    name="reroll",
    help="Rewrite a pretrained transformer into the loops that it is.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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


# in the order of the help
for _command in (inspect, convert, export, targets, plugins, compare, generate, calibrate, passes,
                 diff, evaluate, recover, sample, serve_bench, show):  # fmt: skip
    # a target parses its own options
    _own = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command(context_settings=_own if _command is export else None)(_command)


def main() -> None:
    """Run the command line."""

    # SIGTERM acts like control-C, so that temporary files are removed
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    sys.exit(app(prog_name="reroll"))
