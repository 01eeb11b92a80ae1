"""Write results to stdout, as text, tables or JSON, and everything else to stderr."""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any, TextIO

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
from rich.table import Table

# seconds until progress is shown
PATIENCE = 2.0
# seconds between two lines of progress in a log
LOG_INTERVAL = 30.0

_results: TextIO | None = None


def notes() -> Console:
    """Return the console for progress, remarks and errors: stderr."""
    return Console(stderr=True, highlight=False)


@contextmanager
def stdout_for_results() -> Iterator[None]:
    """Keep stdout for results within a block: what libraries print goes to stderr."""
    global _results
    before, _results = _results, sys.stdout
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _results = before


# ---- results


def write(*things: str | Table) -> None:
    """Write text as it is, and tables, to the results."""
    file = _results or sys.stdout
    # tables in a file or a pipe should not be folded to 80 columns
    console = Console(file=file, highlight=False, width=None if file.isatty() else 160)
    for thing in things:
        if isinstance(thing, Table):
            console.print(thing)
        else:
            file.write(thing if thing.endswith("\n") else f"{thing}\n")
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
