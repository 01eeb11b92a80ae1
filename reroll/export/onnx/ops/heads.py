"""Split and merge heads without transposing the same tensor twice, and attend in groups of them.

Models split projections into heads and transpose them to [batch, heads, time, d]. An operator such
as GroupQueryAttention needs the unsplit tensor. Values keep a reference to it, and nodes that are
then unused are removed from the graph.

GroupQueryAttention is ONNX Runtime's: `--runtime ort`. It appends the new keys and values to the
cache itself. If a host passes the same buffer as past and as present, with room for more tokens,
the cache is not copied at every token. The number of tokens is given by the padding mask, not by
the buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from reroll.export.onnx.graph import Value
from reroll.rewrite.ir.matching import argument, shape
from reroll.rewrite.ir.records import Dim

if TYPE_CHECKING:
    from reroll.export.onnx.emit.translate import Translator

CONTRIB = "com.microsoft"
INT, INT32 = torch.int64, torch.int32


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


# ---- GroupQueryAttention


@dataclass(frozen=True)
class Appended:
    """The two parts of concatenated keys or values: those of the past, and the new ones."""

    past: Value
    new: Value
    # the number of the state, or None if a Loop collects the new tokens
    number: int | None
    part: str


def fits_grouped(g: Translator, k: Value, v: Value, causal: Any, sinks: Any) -> bool:
    """Whether the operator supports an attention: causal, over a cache that grows."""
    grows = k.appended is not None and v.appended is not None
    return g.settings.runtime == "ort" and grows and causal is True and sinks is None


def grouped_attention(
    g: Translator,
    node: fx.Node,
    q: Value,
    k: Value,
    v: Value,
    scale: float,
    mask: Value | None,
    softcap: float | None,
    keys: Any,
) -> Value:
    """Compute [batch, time, heads, v_head_dim] with GroupQueryAttention.

    The mask is additive, [1 or batch, 1 or heads, time, keys]. All rows have the length of the
    batch; padding is hidden by the mask.
    """
    batch, heads, length, _ = shape(argument(node, "q"))
    kv_heads, d_v = shape(argument(node, "v"))[1::2]
    if mask is not None:
        mask = g.op("Expand", mask, g.shape([1, 1, length, keys]))
    caches: tuple[Appended, ...] = (k.appended, v.appended)
    total = g.shape([keys])
    last = g.cast(g.op("Sub", total, g.ints(1)), INT32)
    made, *presents = g.graph.ops(
        "GroupQueryAttention",
        flat(g, q),
        *(flat(g, cache.new) for cache in caches),
        *(cache.past for cache in caches),
        g.op("Expand", last, g.shape([batch])),
        g.op("Squeeze", g.cast(total, INT32), g.ints(0)),
        None,
        None,
        None,
        mask,
        hints=("grouped", "present_key", "present_value"),
        domain=CONTRIB,
        num_heads=heads,
        kv_num_heads=kv_heads,
        scale=scale,
        softcap=softcap,
    )
    for cache, present in zip(caches, presents, strict=True):
        if cache.number is not None:
            g.states.present[cache.number, cache.part] = present
    apart = g.op("Reshape", made, g.ints(0, 0, heads, d_v))
    return replace(apart, heads=Heads(made, 2))
