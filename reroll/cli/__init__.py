"""The command line: parses, calls the library, and reports."""

from reroll.cli.app import app, main

__all__ = ["app", "main"]
