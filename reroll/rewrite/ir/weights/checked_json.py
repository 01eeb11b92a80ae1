"""Checked access to JSON data that was read from a file."""

from __future__ import annotations

from typing import TypeVar

from reroll.errors import ProgramError, located

T = TypeVar("T")


def member(data: object, key: str, *types: type[T]) -> T:
    """Return an entry of a JSON object; ProgramError if it is missing or has none of the types."""
    if not isinstance(data, dict):
        raise ProgramError(f"a JSON object is needed, not {data!r:.80}")
    if key not in data:
        raise ProgramError(f"{key!r} is missing")
    with located(key):
        return typed(data[key], *types)


def typed(value: object, *types: type[T]) -> T:
    """Return a value; ProgramError if it has none of the types."""
    # bool is a subclass of int, but true is not a number
    is_no_number = isinstance(value, bool) and int in types and bool not in types
    if not isinstance(value, types) or is_no_number:
        names = " or ".join(each.__name__ for each in types)
        raise ProgramError(f"{value!r:.80} is not of type {names}")
    return value
