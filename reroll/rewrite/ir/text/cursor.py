"""Tokenizer and parser of one line of a program's text.

The text may be untrusted: sizes and depths are limited, and every error is a ProgramError.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from reroll.errors import ProgramError
from reroll.rewrite.ir.records import Dim, TensorType
from reroll.rewrite.ir.text.literals import MAX_DEPTH, MAX_INT, WORDS

MAX_LINE = 2**20
# characters of one number: the longest repr of a float has 24
MAX_NUMBER = 32

_TOKEN = re.compile(
    r"""\s*(?:
      (?P<node>%[A-Za-z_]\w*)
    | (?P<weight>@(?:[\w.*\-/]+|"(?:[^"\\]|\\.)*"))
    | (?P<string>"(?:[^"\\]|\\.)*")
    | (?P<number>-?(?:\d+(?:\.\d+)?(?:[eE][+-]?\d+)?(?![\w.*\-/])|inf\b))
    | (?P<word>[A-Za-z0-9_][\w.*\-/]*)
    | (?P<mark>[()\[\]{},:=])
    | (?P<end>$)
    )""",
    re.VERBOSE | re.ASCII,
)
_EQUALS = re.compile(r"\s*=")


@dataclass(frozen=True)
class NodeRef:
    """Reference to a node by its name."""

    name: str


@dataclass(frozen=True)
class WeightRef:
    """Reference to a weight by its name."""

    name: str


class Cursor:
    """Line with the position up to which it has been read."""

    def __init__(self, line: str) -> None:
        if len(line) > MAX_LINE:
            raise ProgramError(f"a line has more than {MAX_LINE:,} characters")
        self._line = line
        self._end = 0
        self.token_type = ""
        self.token = ""
        self.advance()

    def advance(self) -> str:
        """Advance to the next token; return the one before it."""
        token = self.token
        match = _TOKEN.match(self._line, self._end)
        if match is None:
            rest = self._line[self._end :].strip()
            raise ProgramError(f"cannot read {rest!r:.40}", where=f"column {self._end + 1}")
        self.token_type = str(match.lastgroup)
        self.token = match[self.token_type]
        self._start, self._end = match.start(self.token_type), match.end()
        return token

    def fail(self, wanted: str) -> NoReturn:
        """Raise ProgramError: `wanted` is needed at this column."""
        token = f"{self.token!r:.60}" if self.token_type != "end" else "the end of the line"
        raise ProgramError(f"{wanted} is needed, not {token}", where=f"column {self._start + 1}")

    def take(self, token_type: str, wanted: str) -> str:
        """Read one token of a kind."""
        if self.token_type != token_type:
            self.fail(wanted)
        return self.advance()

    def accept(self, token: str) -> bool:
        """Read this word or mark if it is next."""
        if self.token_type in ("word", "mark") and self.token == token:
            self.advance()
            return True
        return False

    def expect(self, token: str) -> None:
        """Read this word or mark."""
        if not self.accept(token):
            self.fail(repr(token))

    def end(self) -> None:
        """Check that the line ends here."""
        if self.token_type != "end":
            self.fail("the end of the line")

    def name(self) -> str:
        """Read a name, bare or in quotes."""
        if self.token_type == "string":
            return self.string()
        if self.token_type == "number":
            return self.advance()
        return self.take("word", "a name")

    def keyword(self) -> str | None:
        """Read the name of an argument and its `=`; None if a value is next."""
        if self.token_type != "word" or not _EQUALS.match(self._line, self._end):
            return None
        name = self.advance()
        self.expect("=")
        return name

    def string(self) -> str:
        """Read a string."""
        return self._unquoted(self.take("string", "a string in double quotes"))

    def node(self) -> str:
        """Read the name of a node."""
        return self.take("node", "the name of a node, such as %x,")[1:]

    def integer(self) -> int:
        """Read an integer."""
        value = self._number() if self.token_type == "number" else None
        if not isinstance(value, int):
            self.fail("an integer")
        return value

    def tensor_type(self) -> TensorType:
        """Read a tensor type: `f32[b, s, 576]`."""
        dtype = WORDS.get(self.token) if self.token_type == "word" else None
        if not isinstance(dtype, torch.dtype):
            self.fail("a dtype")
        self.advance()
        self.expect("[")
        shape: list[Dim] = []
        while not self.accept("]"):
            if self.token_type == "number":
                shape.append(self.integer())
            else:
                shape.append(self.name())
            if self.token != "]":
                self.expect(",")
        return TensorType(dtype, tuple(shape))

    def values(self, close: str, depth: int = 0) -> tuple[list[Any], bool]:
        """Read values and the closing bracket; return them, and whether a comma preceded it."""
        values: list[Any] = []
        comma = False
        while not self.accept(close):
            values.append(self.value(depth))
            comma = self.accept(",")
            if not comma and self.token != close:
                self.fail(f"',' or {close!r}")
        return values, comma

    def value(self, depth: int = 0) -> Any:
        """Read one argument; nodes and weights are returned as `NodeRef` and `WeightRef`."""
        if depth > MAX_DEPTH:
            raise ProgramError(f"brackets nest deeper than {MAX_DEPTH}")
        if self.token_type == "node":
            return NodeRef(self.node())
        if self.token_type == "weight":
            name = self.advance()[1:]
            return WeightRef(self._unquoted(name) if name.startswith('"') else name)
        if self.token_type == "string":
            return self.string()
        if self.token_type == "number":
            return self._number()
        if self.accept("["):
            return self.values("]", depth + 1)[0]
        if self.accept("("):
            values, comma = self.values(")", depth + 1)
            if len(values) == 1 and not comma:
                raise ProgramError("a tuple of one value needs a comma: (x,)")
            return tuple(values)
        if self.accept("device"):
            self.expect("(")
            device = self._device()
            self.expect(")")
            return device
        if self.token_type == "word" and self.token in WORDS:
            return WORDS[self.advance()]
        return self.fail("a value")

    def _device(self) -> torch.device:
        text = self.string()
        try:
            return torch.device(text)
        except RuntimeError:
            raise ProgramError(f"{text!r:.40} is not a device") from None

    def _number(self) -> int | float:
        text = self.token
        if len(text) > MAX_NUMBER:
            raise ProgramError(f"the number {text[:12]}... has too many digits")
        self.advance()
        if text.lstrip("-").isdigit():
            number = int(text)
            if abs(number) > MAX_INT:
                raise ProgramError(f"the integer {text} does not fit 64 bits")
            return number
        value = float(text)
        if abs(value) == float("inf") and not text.endswith("inf"):
            raise ProgramError(f"the number {text} is beyond a float", hint="write inf")
        return value

    def _unquoted(self, token: str) -> str:
        try:
            return str(json.loads(token))
        except json.JSONDecodeError as error:
            raise ProgramError(f"{token!r:.40} is not a string: {error.msg}") from None
