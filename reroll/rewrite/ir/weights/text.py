r"""Format weight tables as readable text that parses back to the same table.

Each weight is one line, shared subexpressions are ``let`` lines, and runs are folded to ranges::

    let %{1..30} = svd(sub(source("layers.{0..29}.w", f32[8, 8]), %0), 4, "exact")
    weight layers.*.w : f32[8, 8] = [mean(source("layers.<0..29>.w", f32[8, 8]))] trips [0 x30]
    weight layers.*.up : f32[8, 4] = [slice(%{1..30}, 0, 0, 8)] trips [0..29]

Ranges in braces count over the entries of a stack (or over ``let`` lines), and ranges in angle
brackets over the arguments of one function.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import groupby

from reroll.rewrite.ir.weights.expressions import Apply, Argument, Expr, Source, walk
from reroll.rewrite.ir.weights.ranges import fold, indices_to_text
from reroll.rewrite.ir.weights.stacked import WeightTable

# a deeper subtree gets its own ``let`` line, so that parsing needs little recursion
MAX_HEIGHT = 16
# shorter runs of arguments are easier to read one by one
SHORTEST_RUN = 3

_BARE_NAME = re.compile(r"[A-Za-z0-9_.*\-/]+")


def expr_to_text(expr: Expr) -> str:
    """Format an expression: ``let`` lines for shared subtrees, then one line."""
    printer = _Printer([expr])
    return "\n".join([*printer.lets(), printer.text(expr)])


def table_to_text(table: WeightTable) -> str:
    """Format a weight table: ``let`` lines, then one line for each weight, in order."""
    printer = _Printer(e for weight in table.values() for e in weight.entries)
    lines = list(printer.lets())
    for name, weight in table.items():
        entries = [printer.text(e) for e in weight.entries]
        if weight.index is None:
            value = entries[0]
        else:
            value = f"[{', '.join(fold(entries))}] trips [{indices_to_text(weight.index)}]"
        frozen = "" if weight.trainable else " frozen"
        lines.append(f"weight {_name(name)} : {weight.meta} = {value}{frozen}")
    return "".join(f"{line}\n" for line in lines)


def _quoted(text: str) -> str:
    """Quote a string, with the characters that delimit ranges escaped."""
    escape = {ord(c): f"\\u{ord(c):04x}" for c in "{}<>"}
    return json.dumps(text).translate(escape)


def _name(name: str) -> str:
    return name if _BARE_NAME.fullmatch(name) else _quoted(name)


class _Printer:
    """Formatter of expressions that binds shared and deep ones to ``%`` numbers."""

    def __init__(self, roots: Iterable[Expr]) -> None:
        roots = list(roots)
        nodes = list(walk(roots))
        uses = Counter(roots)
        for node in nodes:
            uses.update(node.children if isinstance(node, Apply) else ())
        height: dict[Expr, int] = {}
        level: dict[Expr, int] = {}
        # numbers are not known yet: with 0 for all, texts are the skeletons that ``let`` lines are
        # sorted by
        self._bound: dict[Expr, str] = {}
        for node in nodes:
            below = node.children if isinstance(node, Apply) else ()
            height[node] = 1 + max((height[c] for c in below), default=0)
            level[node] = max((level[c] for c in below), default=0)
            shared = isinstance(node, Apply) and uses[node] > 1
            if shared or height[node] >= MAX_HEIGHT:
                self._bound[node] = "%0"
                height[node] = 0
                level[node] += 1
        self._number(level)

    def _number(self, level: dict[Expr, int]) -> None:
        skeletons = {node: re.sub(r"\d+", "0", self._apply(node)) for node in self._bound}
        first: dict[str, int] = {}
        for skeleton in skeletons.values():
            first.setdefault(skeleton, len(first))
        order = sorted(self._bound, key=lambda node: (level[node], first[skeletons[node]]))
        self._bound = {node: f"%{i}" for i, node in enumerate(order)}

    def lets(self) -> Iterator[str]:
        """Yield the ``let`` lines, each after those that it needs."""
        return fold([f"let {name} = {self._apply(node)}" for node, name in self._bound.items()])

    def text(self, expr: Expr) -> str:
        """Format an expression."""
        return self._bound.get(expr) or self._apply(expr)

    def _apply(self, expr: Expr) -> str:
        if isinstance(expr, Source):
            return f"source({_quoted(expr.name)}, {expr.meta})"
        assert isinstance(expr, Apply)
        return f"{expr.op}({', '.join(self._arguments(expr.args))})"

    def _arguments(self, args: tuple[Argument, ...]) -> Iterator[str]:
        # adjacent sources of the same Meta are folded into one
        for meta, run in groupby(args, lambda a: a.meta if isinstance(a, Source) else None):
            if meta is None:
                yield from (self.text(a) if isinstance(a, Expr) else _constant(a) for a in run)
            else:
                names = [_quoted(a.name) for a in run if isinstance(a, Source)]
                for name in fold(names, angles=True, shortest=SHORTEST_RUN):
                    yield f"source({name}, {meta})"


def _constant(value: int | float | str | bool | tuple[int, ...]) -> str:
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return repr(value).lower()
