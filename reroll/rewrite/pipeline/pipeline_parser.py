"""Recursive-descent parser of pipeline text; it evaluates nothing.

    pipeline = call {"," call}
    call     = word ["(" [word "=" value {"," word "=" value}] ")"]
    value    = number | "true" | "false" | "none" | "inf" | word | string
             | "[" [value {"," value}] "]" | "{" [key ":" value {"," key ":" value}] "}"
    key      = word | string | integer

A word may contain dots, dashes and stars. Strings are those of JSON, or in single quotes. A comma
may follow the last item everywhere; white space and line breaks are ignored.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any, NoReturn

from reroll.errors import UsageError

MAX_DEPTH = 32
MAX_DIGITS = 400

WORD = re.compile(r"[A-Za-z_*][A-Za-z0-9_.*\-]*")
_NUMBER = re.compile(r"[+-]?(\d[\d_]*\.?\d*|\.\d+)([eE][+-]?\d+)?(?![A-Za-z0-9_.])")
_INTEGER = re.compile(r"[+-]?\d[\d_]*")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"|\'(?:[^\'\\]|\\.)*\'', re.DOTALL)
_SPACE = re.compile(r"\s*")
_CONSTANTS: dict[str, Any] = {
    "true": True,
    "false": False,
    "none": None,
    "null": None,
    "inf": math.inf,
    "-inf": -math.inf,
    "+inf": math.inf,
}
# words with values of their own; a string equal to one of them has to be quoted
RESERVED = frozenset(_CONSTANTS)


@dataclass(frozen=True)
class Call:
    """Parsed call of one pass: its name, its options, and their positions in the text."""

    name: str
    options: dict[str, Any]
    position: int
    positions: dict[str, int]


def parse_calls(text: str) -> list[Call]:
    """Parse the calls of a pipeline; UsageError with the position of the error."""
    parser = _Parser(text)
    calls = []
    while not parser.at_end():
        calls.append(parser.call())
        if not parser.take(",") and not parser.at_end():
            parser.fail("expected ',' between two passes")
    return calls


def pointed(text: str, position: int, message: str, hint: str | None = None) -> UsageError:
    """Build an error with the line at fault and a caret under the position."""
    start = text.rfind("\n", 0, position) + 1
    end = text.find("\n", position)
    line = text[start : len(text) if end < 0 else end]
    column = position - start
    # of a long line, only the part around the position is shown
    left = max(0, column - 60)
    shown = line[left : column + 40].replace("\t", " ")
    number = text.count("\n", 0, position) + 1
    location = f"line {number}, column {column + 1}" if "\n" in text else f"column {column + 1}"
    caret = " " * (column - left) + "^"
    return UsageError(f"{message}\n  {shown}\n  {caret}", where=f"pipeline, {location}", hint=hint)


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0
        self.depth = 0
        self.skip()

    def skip(self) -> None:
        match = _SPACE.match(self.text, self.position)
        assert match is not None
        self.position = match.end()

    def at_end(self) -> bool:
        return self.position == len(self.text)

    def fail(self, message: str, position: int | None = None) -> NoReturn:
        raise pointed(self.text, self.position if position is None else position, message)

    def take(self, mark: str) -> bool:
        """Consume a punctuation mark if it is next."""
        if not self.text.startswith(mark, self.position):
            return False
        self.position += len(mark)
        self.skip()
        return True

    def need(self, mark: str, where: str) -> None:
        if not self.take(mark):
            actual = self.text[self.position : self.position + 1] or "the end"
            self.fail(f"expected {mark!r} {where}, found {actual}")

    def match(self, pattern: re.Pattern[str]) -> str | None:
        match = pattern.match(self.text, self.position)
        if match is None:
            return None
        self.position = match.end()
        self.skip()
        return match.group()

    def call(self) -> Call:
        position = self.position
        name = self.match(WORD) or self.fail("expected the name of a pass")
        options: dict[str, Any] = {}
        positions: dict[str, int] = {}
        if self.take("("):
            while not self.take(")"):
                start = self.position
                key = self.match(WORD) or self.fail("expected the name of an option")
                if key in options:
                    self.fail(f"{key} is given twice", start)
                self.need("=", f"after {key}")
                positions[key] = start
                options[key] = self.value()
                if not self.take(",") and not self.text.startswith(")", self.position):
                    self.fail("expected ',' or ')' after an option")
        return Call(name, options, position, positions)

    def value(self) -> Any:
        if self.depth >= MAX_DEPTH:
            self.fail("too many brackets inside each other")
        self.depth += 1
        try:
            if self.take("["):
                return self.items()
            if self.take("{"):
                return self.pairs()
            return self.scalar()
        finally:
            self.depth -= 1

    def items(self) -> list[Any]:
        items = []
        while not self.take("]"):
            items.append(self.value())
            if not self.take(",") and not self.text.startswith("]", self.position):
                self.fail("expected ',' or ']' in a list")
        return items

    def pairs(self) -> dict[Any, Any]:
        pairs: dict[Any, Any] = {}
        while not self.take("}"):
            start = self.position
            key = self.scalar()
            if not isinstance(key, str | int) or isinstance(key, bool):
                self.fail("a key is a word, a string or an integer", start)
            if key in pairs:
                self.fail(f"{key} is given twice", start)
            self.need(":", f"after {key}")
            pairs[key] = self.value()
            if not self.take(",") and not self.text.startswith("}", self.position):
                self.fail("expected ',' or '}' in a mapping")
        return pairs

    def scalar(self) -> Any:
        start = self.position
        if self.text.startswith(("'", '"'), start):
            return self.string()
        if self.text.startswith(("-inf", "+inf"), start):
            self.position += 4
            self.skip()
            return _CONSTANTS[self.text[start : start + 4]]
        number = self.match(_NUMBER)
        if number is not None:
            return self.number(number, start)
        word = self.match(WORD)
        if word is None:
            self.fail("expected a value")
        return _CONSTANTS.get(word.lower(), word)

    def number(self, digits: str, start: int) -> int | float:
        if len(digits) > MAX_DIGITS:
            self.fail("this number is absurdly long", start)
        try:
            return int(digits) if _INTEGER.fullmatch(digits) else float(digits)
        except ValueError:
            self.fail(f"{digits} is not a number", start)

    def string(self) -> str:
        start = self.position
        quoted = self.match(_STRING)
        if quoted is None:
            self.fail("this string has no end", start)
        if quoted[0] == "'":
            change = {"\\'": "'", '"': '\\"'}
            inner = re.sub(r'\\.|"', lambda m: change.get(m.group(), m.group()), quoted[1:-1])
            quoted = f'"{inner}"'
        try:
            return str(json.loads(quoted, strict=False))
        except ValueError as error:
            self.fail(f"this is not a string: {error}", start)
