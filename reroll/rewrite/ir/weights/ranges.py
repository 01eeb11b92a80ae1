"""Fold texts that differ in integers only into one text with ranges: ``layers.{0..29}.w``.

``{first..last}`` counts by one and ``{first..last..step}`` by any step; several ranges in one text
advance together.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from reroll.errors import ProgramError

MAX_COUNT = 2**16

# digits with a leading zero are no integer of a range
_INTEGER = re.compile(r"(?<!\d)(0|[1-9]\d{0,14})(?!\d)")
_BRACES = re.compile(r"\{(\d{1,15})\.\.(\d{1,15})(?:\.\.(-?\d{1,15}))?\}")
_ANGLES = re.compile(r"<(\d{1,15})\.\.(\d{1,15})(?:\.\.(-?\d{1,15}))?>")


def fold(texts: Sequence[str], *, angles: bool = False, shortest: int = 2) -> Iterator[str]:
    """Yield the texts in order, with each run that counts in its integers folded into one text."""
    parts = [_INTEGER.split(text) for text in texts]
    start = 0
    while start < len(texts):
        steps, stop = _run(parts, start)
        if stop - start >= shortest:
            yield _template(parts[start], steps, stop - start, "<>" if angles else "{}")
            start = stop
        else:
            yield texts[start]
            start += 1


def _run(parts: Sequence[Sequence[str]], start: int) -> tuple[list[int], int]:
    """Find the longest run from ``start``; return the steps of its integers, and its end."""
    steps: list[int] = []
    stop = start + 1
    while stop < len(parts) and parts[stop][::2] == parts[start][::2]:
        before, after = parts[stop - 1][1::2], parts[stop][1::2]
        change = [int(b) - int(a) for a, b in zip(before, after, strict=True)]
        if change != (steps or change) or not any(change) or stop - start == MAX_COUNT:
            break
        steps = change
        stop += 1
    return steps, stop


def _template(parts: Sequence[str], steps: Sequence[int], count: int, brackets: str) -> str:
    text = parts[0]
    for value, step, literal in zip(parts[1::2], steps, parts[2::2], strict=True):
        last = int(value) + step * (count - 1)
        suffix = "" if step == 1 else f"..{step}"
        text += f"{brackets[0]}{value}..{last}{suffix}{brackets[1]}" if step else value
        text += literal
    return text


def unfold(text: str, *, angles: bool = False) -> list[str]:
    """Expand a folded text; ProgramError if its ranges have different lengths."""
    pattern = _ANGLES if angles else _BRACES
    ranges = [_counted(match) for match in pattern.finditer(text)]
    if not ranges:
        return [text]
    count = len(ranges[0])
    if any(len(r) != count for r in ranges):
        raise ProgramError(f"the ranges in {text:.80} have different lengths")
    # a split keeps the three groups of each match between the literals
    literals = pattern.split(text)[::4]
    return [
        literals[0] + "".join(f"{r[i]}{tail}" for r, tail in zip(ranges, literals[1:], strict=True))
        for i in range(count)
    ]


def _counted(match: re.Match[str]) -> range:
    first, last = int(match[1]), int(match[2])
    step = int(match[3]) if match[3] else 1
    direction = 1 if step > 0 else -1
    if step == 0 or (last - first) % step or (last - first) // step < 0:
        raise ProgramError(f"{match[0]} is not a range")
    if (last - first) // step >= MAX_COUNT:
        raise ProgramError(f"{match[0]} is too long a range")
    return range(first, last + direction, step)


def indices_to_text(values: Sequence[int]) -> str:
    """Format numbers with runs written as ``0..9`` and repeats as ``3 x4``."""
    parts = []
    i = 0
    while i < len(values):
        same = rising = i + 1
        while same < len(values) and values[same] == values[i]:
            same += 1
        while rising < len(values) and values[rising] == values[rising - 1] + 1:
            rising += 1
        if same - i > 1:
            parts.append(f"{values[i]} x{same - i}")
        elif rising - i > 1:
            parts.append(f"{values[i]}..{values[rising - 1]}")
        else:
            parts.append(str(values[i]))
        i = max(same, rising)
    return ", ".join(parts)


def indices_from_text(text: str) -> tuple[int, ...]:
    """Parse numbers in the format of `indices_to_text`."""
    values: list[int] = []
    for part in text.split(",") if text.strip() else []:
        match = re.fullmatch(r"\s*(\d{1,9})(?:\.\.(\d{1,9})|\s*x\s*(\d{1,9}))?\s*", part)
        if match is None:
            raise ProgramError(f"{part.strip()!r:.80} is not a trip, a range or a repeat")
        first = int(match[1])
        count = int(match[2]) - first + 1 if match[2] else int(match[3] or 1)
        if not 1 <= count <= MAX_COUNT - len(values):
            raise ProgramError(f"{part.strip()!r} is not a possible number of trips")
        values.extend(range(first, first + count) if match[2] else [first] * count)
    return tuple(values)
