"""Make a function a command: it gets the options of every command, and its errors are reported."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import typer
from rich.markup import escape

from reroll.cli.options import Debug, Load
from reroll.cli.terminal import notes, stdout_for_results
from reroll.errors import RerollError, UsageError

F = TypeVar("F", bound=Callable[..., None])

# the options of every command
_SHARED = {
    name: inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value, annotation=kind)
    for name, kind, value in (("load", Load, None), ("debug", Debug, False))
}


def command(function: F) -> F:
    """Add the options of all commands to a command, and report its errors in three lines.

    The exit status is 2 if the command was used wrongly, 1 if something else failed, 130 if it was
    interrupted. Output of libraries on stdout goes to stderr.
    """
    signature = inspect.signature(function, eval_str=True)
    shared = {n: p for n, p in _SHARED.items() if n not in signature.parameters}

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> None:
        debug, files = bool(kwargs.get("debug")), kwargs.get("load") or ()
        with stdout_for_results(), _logging(debug):
            try:
                if files:
                    from reroll.rewrite.pipeline.registry import load_file

                    for file in files:
                        load_file(file)
                function(*args, **{n: v for n, v in kwargs.items() if n not in shared})
            except RerollError as error:
                report_error(error.message, error.where, error.hint, debug)
                raise typer.Exit(2 if isinstance(error, UsageError) else 1) from None
            except (typer.Exit, typer.Abort):
                raise
            except KeyboardInterrupt:
                report_error("interrupted", None, None, debug)
                raise typer.Exit(130) from None
            except BrokenPipeError:
                raise typer.Exit(1) from None
            except Exception as error:
                reason = str(error).strip().partition("\n")[0]
                what = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
                hint = None if debug else "rerun with --debug for a traceback"
                report_error(what, None, hint, debug)
                raise typer.Exit(1) from None

    parameters = [*signature.parameters.values(), *shared.values()]
    guarded.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    guarded.__annotations__ = {p.name: p.annotation for p in parameters}
    return guarded  # type: ignore[return-value]


def report_error(what: str, where: str | None, hint: str | None, debug: bool = False) -> None:
    """Print an error in up to three lines."""
    if debug:
        traceback.print_exc(file=sys.stderr)
    console = notes()
    for name, text, style in (
        ("error", what, "bold red"),
        ("where", where, "bold"),
        ("hint", hint, "bold"),
    ):
        if text is not None:
            console.print(f"[{style}]{name}:[/] {escape(text)}", soft_wrap=True)


@contextmanager
def _logging(debug: bool) -> Iterator[None]:
    """Log to stderr at the level of --debug or of the variable REROLL_LOG."""
    name = "DEBUG" if debug else os.environ.get("REROLL_LOG", "").upper()
    level = getattr(logging, name, None) if name else logging.WARNING
    logger = logging.getLogger("reroll")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level if isinstance(level, int) else logging.WARNING)
    try:
        if name and not isinstance(level, int):
            logger.warning("REROLL_LOG=%s is no level: debug, info, warning or error", name)
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
