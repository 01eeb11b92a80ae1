"""Recursive-descent parser of one weight expression; it evaluates nothing.

Nesting and sizes are limited, and every error is a ProgramError with the column.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import NamedTuple, NoReturn

from reroll.errors import ProgramError, located
from reroll.rewrite.ir.weights.expressions import (
    Argument,
    Expr,
    Meta,
    Source,
    build,
    dtype_from_name,
)
from reroll.rewrite.ir.weights.ranges import unfold

MAX_DEPTH = 64

_TOKEN = re.compile(
    r"""\s*(?:
    (?P<string>"(?:[^"\\]|\\.)*")
  | (?P<number>-?\d{1,40}(?:\.\d{1,40})?(?:[eE][+-]?\d{1,4})?)
  | (?P<bound>%\d{1,9})
  | (?P<word>[A-Za-z_]\w*)
  | (?P<mark>[()\[\],])
  | (?P<end>$)
  )""",
    re.VERBOSE,
)


def string_value(literal: str) -> str:
    """Decode a JSON string literal."""
    try:
        return str(json.loads(literal, strict=False))
    except ValueError:
        raise ProgramError(f"{literal:.80} is not a string") from None


class Token(NamedTuple):
    """Token of the text: its kind, its characters, and the index of the first."""

    token_type: str
    text: str
    position: int


class ExprParser:
    """Recursive-descent parser of one line; ``shift`` is the column of the text's start."""

    def __init__(self, text: str, start: int, shift: int, bound: Mapping[str, Expr]) -> None:
        self._text = text
        self._shift = shift
        self._bound = bound
        self._next = self._scan(start)

    def only_expr(self) -> Expr:
        """Read one expression and the end of the text."""
        first = self._next
        values = self._argument(0)
        self._expect("end", "")
        if len(values) != 1 or not isinstance(values[0], Expr):
            self._fail("this is not one expression", first)
        return values[0]

    def only_meta(self) -> Meta:
        """Read one dtype with sizes and the end of the text."""
        meta = self._meta()
        self._expect("end", "")
        return meta

    # ---- tokens

    def _fail(self, message: str, token: Token | None = None) -> NoReturn:
        position = (token or self._next).position
        raise ProgramError(message, where=f"column {self._shift + position + 1}")

    def _scan(self, position: int) -> Token:
        match = _TOKEN.match(self._text, position)
        if match is None or match.lastgroup is None:
            blank = len(self._text[position:]) - len(self._text[position:].lstrip())
            text = self._text[position + blank :]
            self._fail(f"{text:.20} cannot be read", Token("", "", position + blank))
        return Token(match.lastgroup, match[match.lastgroup], match.start(match.lastgroup))

    def _take(self) -> Token:
        token = self._next
        self._next = self._scan(token.position + len(token.text))
        return token

    def _accept(self, mark: str) -> bool:
        if self._next.token_type == "mark" and self._next.text == mark:
            self._take()
            return True
        return False

    def _expect(self, token_type: str, text: str | None = None) -> Token:
        if self._next.token_type != token_type or text not in (None, self._next.text):
            wanted = text or f"a {token_type}" if token_type != "end" else "the end"
            self._fail(f"{wanted} is needed here, not {self._next.text[:20] or 'the end'!r}")
        return self._take() if token_type != "end" else self._next

    # ---- grammar

    def _argument(self, depth: int) -> list[Argument]:
        """Read one argument; a source with a range in angle brackets gives several."""
        token = self._take()
        if token.token_type == "word" and token.text in ("true", "false"):
            return [token.text == "true"]
        if token.token_type == "word" and token.text == "source":
            return list(self._source())
        if token.token_type == "word":
            return [self._call(token, depth)]
        if token.token_type == "bound":
            if token.text not in self._bound:
                self._fail(f"{token.text} is not bound before its use", token)
            return [self._bound[token.text]]
        if token.token_type == "string":
            return [self._string(token)]
        if token.token_type == "number":
            return [self._number(token)]
        if token.token_type == "mark" and token.text == "[":
            return [self._integers()]
        return self._fail(
            f"an expression is needed here, not {token.text[:20] or 'the end'!r}", token
        )

    def _call(self, op: Token, depth: int) -> Expr:
        if depth >= MAX_DEPTH:
            self._fail(f"expressions may nest {MAX_DEPTH} deep; use let lines", op)
        self._expect("mark", "(")
        args: list[Argument] = []
        while not self._accept(")"):
            if args:
                self._expect("mark", ",")
            args.extend(self._argument(depth + 1))
        with located(f"column {self._shift + op.position + 1}"):
            return build(op.text, *args)

    def _source(self) -> list[Source]:
        self._expect("mark", "(")
        name = self._expect("string")
        self._expect("mark", ",")
        meta = self._meta()
        self._expect("mark", ")")
        with located(f"column {self._shift + name.position + 1}"):
            return [Source(string_value(text), meta) for text in unfold(name.text, angles=True)]

    def _meta(self) -> Meta:
        dtype = self._expect("word")
        self._expect("mark", "[")
        sizes = self._integers()
        with located(f"column {self._shift + dtype.position + 1}"):
            return Meta(sizes, dtype_from_name(dtype.text))

    def _integers(self) -> tuple[int, ...]:
        """Read integers and the closing bracket, after the opening one."""
        values: list[int] = []
        while not self._accept("]"):
            if values:
                self._expect("mark", ",")
            token = self._expect("number")
            value = self._number(token)
            if not isinstance(value, int):
                self._fail("an integer is needed here", token)
            values.append(value)
        return tuple(values)

    def _number(self, token: Token) -> int | float:
        return float(token.text) if re.search(r"[.eE]", token.text) else int(token.text)

    def _string(self, token: Token) -> str:
        with located(f"column {self._shift + token.position + 1}"):
            return string_value(token.text)
