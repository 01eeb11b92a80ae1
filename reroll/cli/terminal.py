"""Write results to stdout and everything else to stderr, and report how a command fails."""

from __future__ import annotations

import functools
import inspect
import json
import logging
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any, TextIO, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from reroll.errors import RerollError, UsageError

F = TypeVar("F", bound=Callable[..., None])

# seconds until progress is shown
PATIENCE = 2.0
# seconds between two lines of progress in a log
LOG_INTERVAL = 30.0

_results: TextIO | None = None


def notes() -> Console:
    """Return the console for progress, remarks and errors: stderr."""
    return Console(stderr=True, highlight=False)


def results() -> Console:
    """Return the console for results: the command's stdout."""
    file = _results or sys.stdout
    # tables in a file or a pipe should not be folded to 80 columns
    width = None if file.isatty() else 160
    return Console(file=file, highlight=False, width=width)


def write(text: str) -> None:
    """Write text to the results as it is."""
    file = _results or sys.stdout
    file.write(text if text.endswith("\n") else f"{text}\n")
    file.flush()


def write_json(data: Any) -> None:
    """Write a result as one JSON document; numbers that JSON cannot represent become null."""
    write(json.dumps(_plain(data), indent=2, ensure_ascii=False, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


# ---- failing


Load = Annotated[
    list[Path] | None,
    typer.Option(
        help="A Python file with passes, mixers, targets, stages or measures; it is run. "
        "Repeatable.",
        show_default=False,
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Log everything, and show tracebacks.")]

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
        with _stdout_for_results(), _logging(debug):
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
def _stdout_for_results() -> Iterator[None]:
    global _results
    before, _results = _results, sys.stdout
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _results = before


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


# ---- progress


class Bars:
    """Progress bar on stderr, shown once the work has taken longer than `PATIENCE`.

    Without a terminal, as in a log, a line reports progress every `LOG_INTERVAL` seconds.
    """

    def __init__(self) -> None:
        self._told = time.monotonic()
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=notes(),
            transient=True,
        )
        self._task = self._progress.add_task("", total=None)
        self._timer = threading.Timer(PATIENCE, self._progress.start)
        self._timer.daemon = True

    def __enter__(self) -> Bars:
        if self._progress.console.is_terminal:
            self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        # stopping a bar that has not started prints an empty line
        if self._progress.live.is_started:
            self._progress.stop()

    def __call__(self, done: int, total: int, what: str) -> None:
        """Show progress; a `total` of 0 is not known."""
        self._progress.update(self._task, description=what, completed=done, total=total or None)
        if not self._progress.console.is_terminal:
            now = time.monotonic()
            if now - self._told >= LOG_INTERVAL:
                self._told = now
                self.print(f"{what} {done}/{total}" if total else f"{what} {done}")

    def print(self, text: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(escape(text), soft_wrap=True)


class Stopwatch:
    """Seconds of each step, by its name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time a block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = time.perf_counter() - start
