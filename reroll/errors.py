"""Errors that reroll raises: each says what went wrong, where, and what to do next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class RerollError(Exception):
    """Base of all errors of this package.

    Attributes:
        message: what went wrong.
        where: the pass, node, module path, file or line at fault, if known.
        hint: what to do next, if there is something to do.
    """

    def __init__(self, message: str, where: str | None = None, hint: str | None = None) -> None:
        # all three go to Exception.args, so that pickling and copying keep them
        super().__init__(message, where, hint)
        self.message = message
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        text = self.message if self.where is None else f"{self.where}: {self.message}"
        return text if self.hint is None else f"{text}\n  hint: {self.hint}"


class CaptureError(RerollError):
    """A model cannot be captured as a graph."""


class CheckpointError(RerollError):
    """A checkpoint file is missing, damaged, or does not fit the model."""


class ProgramError(RerollError):
    """A program's text, JSON, graph or weight table is not valid."""


class PassError(RerollError):
    """A pass cannot do what it was asked to do, or broke its contract."""


class UsageError(RerollError):
    """An option or argument given by the user is wrong."""


class ContextError(UsageError, RuntimeError):
    """A call is made where it cannot do what it says, such as loading on the meta device."""


class UntrustedCodeError(UsageError):
    """A model needs Python code that comes with it, and running it was not allowed."""


class ExportError(RerollError):
    """A program cannot be written for an export target."""


class RecoveryError(RerollError):
    """A training run cannot continue."""


@contextmanager
def located(where: str) -> Iterator[None]:
    """Prefix the `where` of any RerollError raised inside with a location."""
    try:
        yield
    except RerollError as error:
        inner = where if error.where is None else f"{where}: {error.where}"
        raise type(error)(error.message, inner, error.hint) from error.__cause__
