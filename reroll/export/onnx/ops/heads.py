"""Split and merge heads without transposing the same tensor twice.

Models split projections into heads and transpose them to [batch, heads, time, d]. An operator such
as GroupQueryAttention needs the unsplit tensor. Values keep a reference to it, and nodes that are
then unused are removed from the graph.
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
    """The value before its heads were split.

    `flat` is the value as [batch, time, heads * d]; `axis` is the dimension of the heads, 2 or 1.
    """

    flat: Value
    axis: int


def reshape(g: Translator, x: Value, before: Sequence[Dim], after: Sequence[Dim]) -> Value:
    """Reshape between two shapes of the Program, which may split or merge heads."""
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
    """Permute dimensions."""
    made = g.op("Transpose", x, perm=list(order))
    if x.heads is None or list(order) != [0, 2, 1, 3]:
        return made
    return replace(made, heads=replace(x.heads, axis=3 - x.heads.axis))


def flat(g: Translator, x: Value) -> Value:
    """Reshape [batch, heads, time, d] to [batch, time, heads * d]."""
    if x.heads is not None and x.heads.axis == 1:
        found: Value = x.heads.flat
        return found
    turned = g.op("Transpose", x, perm=[0, 2, 1, 3])
    return g.op("Reshape", turned, g.ints(0, 0, -1))
