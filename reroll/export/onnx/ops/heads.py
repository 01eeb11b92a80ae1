"""Heads put apart and together again: what is the same tensor is not turned twice.

Models cut projections into heads and turn them to [batch, heads, time, d]; an operator such as
GroupQueryAttention wants them as they were. A value remembers that, and what is then not read
leaves the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from reroll.export.onnx.graph import Value
from reroll.rewrite.ir.records import Dim

if TYPE_CHECKING:
    from reroll.export.onnx.emit.translate import Translator


@dataclass(frozen=True)
class Heads:
    """`flat` is the value as [batch, time, heads * d]; `axis` is where its heads are, 2 or 1."""

    flat: Value
    axis: int


def reshape(g: Translator, x: Value, before: Sequence[Dim], after: Sequence[Dim]) -> Value:
    """A reshape between two shapes of the Program, which may put heads apart or together."""
    before, after = tuple(before), tuple(after)
    if _apart(after, before) and x.heads is not None and x.heads.axis == 2:
        flat: Value = x.heads.flat
        return flat
    made = g.reshape(x, before, after)
    return replace(made, heads=Heads(x, 2)) if _apart(before, after) else made


def _apart(flat: tuple[Dim, ...], heads: tuple[Dim, ...]) -> bool:
    """Whether [batch, time, heads * d] becomes [batch, time, heads, d]."""
    return len(flat) == 3 and len(heads) == 4 and flat[:2] == heads[:2]


def transpose(g: Translator, x: Value, order: Sequence[int]) -> Value:
    """Dimensions in another order."""
    made = g.op("Transpose", x, perm=list(order))
    if x.heads is None or list(order) != [0, 2, 1, 3]:
        return made
    return replace(made, heads=replace(x.heads, axis=3 - x.heads.axis))


def flat(g: Translator, x: Value) -> Value:
    """[batch, heads, time, d] as [batch, time, heads * d]."""
    if x.heads is not None and x.heads.axis == 1:
        found: Value = x.heads.flat
        return found
    turned = g.op("Transpose", x, perm=[0, 2, 1, 3])
    return g.op("Reshape", turned, g.ints(0, 0, -1))
