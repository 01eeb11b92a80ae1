"""Parse the text format of weights, line by line.

The text may be untrusted: the expansion of ranges is limited, and every error is a ProgramError
with line and column.
"""

from __future__ import annotations

import re

from reroll.errors import ProgramError, located
from reroll.rewrite.ir.weights.expression_parser import ExprParser, string_value
from reroll.rewrite.ir.weights.expressions import Expr
from reroll.rewrite.ir.weights.ranges import indices_from_text, unfold
from reroll.rewrite.ir.weights.stacked import Weight, WeightTable

# most characters that the folded texts of one table may expand to
MAX_UNFOLDED = 2**28

_LET = re.compile(r"let\s+(%\d+)\s*=\s*")
_WEIGHT = re.compile(
    r"""weight\s+(?P<name>"(?:[^"\\]|\\.)*"|[^\s":]+)\s*:
        \s*(?P<meta>\w+\s*\[[\d,\s]*\])\s*=\s*""",
    re.VERBOSE,
)
_TRIPS = re.compile(r"\s*trips\s*\[(?P<trips>[^\]]*)\]")
# separators of a stack's items: strings are atomic, and brackets nest
_SPLIT = re.compile(r"""(?P<string>"(?:[^"\\]|\\.)*")|[(\[]|[)\]]|,""")


def expr_from_text(text: str) -> Expr:
    """Parse an expression in the format of `expr_to_text`; ProgramError with line and column."""
    reader = _Reader()
    result: Expr | None = None
    for number, line in _lines(text):
        with located(f"line {number}"):
            if result is not None:
                raise ProgramError("nothing may follow the expression")
            if not reader.let(line):
                result = reader.expr(line, 0)
    if result is None:
        raise ProgramError("there is no expression in the text")
    return result


def table_from_text(text: str) -> WeightTable:
    """Parse a table in the format of `table_to_text`; ProgramError with line and column."""
    reader = _Reader()
    weights: dict[str, Weight] = {}
    for number, line in _lines(text):
        with located(f"line {number}"):
            if reader.let(line):
                continue
            name, weight = reader.weight(line)
            if name in weights:
                raise ProgramError(f"there are two weights called {name!r}")
            weights[name] = weight
    table = WeightTable(weights)
    table.stored()
    return table


def _lines(text: str) -> list[tuple[int, str]]:
    lines = enumerate(text.split("\n"), 1)
    return [(i, line.strip()) for i, line in lines if line.strip() and line.strip()[0] != "#"]


class _Reader:
    """Reader of lines, with the expressions bound by ``let`` so far."""

    def __init__(self) -> None:
        self._bound: dict[str, Expr] = {}
        self._budget = MAX_UNFOLDED

    def _unfold(self, text: str) -> list[str]:
        texts = unfold(text)
        self._budget -= sum(map(len, texts))
        if self._budget < 0:
            raise ProgramError("the ranges of this text unfold to too much")
        return texts

    def let(self, line: str) -> bool:
        """Read a ``let`` line; False if it is another kind of line."""
        if not re.match(r"let\b", line):
            return False
        for text in self._unfold(line):
            match = _LET.match(text)
            if match is None:
                raise ProgramError("this is not `let %number = expression`", where="column 1")
            if match[1] in self._bound:
                raise ProgramError(f"{match[1]} is bound twice", where="column 1")
            self._bound[match[1]] = self.expr(text, match.end())
        return True

    def weight(self, line: str) -> tuple[str, Weight]:
        """Read a ``weight`` line."""
        head = _WEIGHT.match(line)
        if head is None:
            raise ProgramError(
                "this is not a let or weight line",
                where="column 1",
                hint="write `weight NAME : DTYPE[SIZES] = EXPRESSION`",
            )
        name = head["name"]
        if name.startswith('"'):
            name = string_value(name)
        rest, frozen = re.subn(r"(?<=[\])\d])\s+frozen$", "", line)
        index = None
        if rest.startswith("[", head.end()):
            items, stop = _items(rest, head.end())
            entries = [
                self.expr(text, 0, start) for start, item in items for text in self._unfold(item)
            ]
            trips = _TRIPS.fullmatch(rest, stop)
            if trips is None:
                raise ProgramError("`trips [...]` is missing", where=f"column {stop + 1}")
            index = indices_from_text(trips["trips"])
        else:
            entries = [self.expr(rest, head.end())]
        with located(name):
            weight = Weight(tuple(entries), index, not frozen)
            meta = ExprParser(head["meta"], 0, head.start("meta"), {}).only_meta()
            if meta != weight.meta:
                raise ProgramError(f"it is declared {meta}, but its expression is {weight.meta}")
        return name, weight

    def expr(self, text: str, start: int, shift: int = 0) -> Expr:
        """Parse an expression that ends with the text."""
        return ExprParser(text, start, shift, self._bound).only_expr()


def _items(text: str, start: int) -> tuple[list[tuple[int, str]], int]:
    """Split the bracket at ``start`` into items with positions; return them and its end."""
    items = []
    depth = 0
    item_start = start + 1
    for match in _SPLIT.finditer(text, start):
        if match["string"]:
            continue
        depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(match[0], 0)
        if depth == 0 or (depth == 1 and match[0] == ","):
            items.append((item_start, text[item_start : match.start()]))
            item_start = match.end()
        if depth == 0:
            return items, match.end()
    raise ProgramError("the bracket is not closed", where=f"column {start + 1}")
