"""The command line: parses, calls the library, and reports."""

from reroll.cli import evaluation, recovery, serving, showing  # noqa: F401
from reroll.cli.app import app, main

__all__ = ["app", "main"]
