"""Lower attention to ONNX Runtime's GroupQueryAttention: `--runtime ort`.

The operator appends the new keys and values to the cache itself. If a host passes the same buffer
as past and as present, with room for more tokens, the cache is not copied at every token. The
number of tokens is given by the padding mask, not by the buffer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from reroll.export.onnx.graph import Value
from reroll.export.onnx.ops.heads import Heads, flat
from reroll.rewrite.ir.matching import argument, shape

if TYPE_CHECKING:
    from reroll.export.onnx.emit.translate import Translator

CONTRIB = "com.microsoft"
INT, INT32 = torch.int64, torch.int32


@dataclass(frozen=True)
class Appended:
    """The two parts of concatenated keys or values: those of the past, and the new ones."""

    past: Value
    new: Value
    # the number of the state, or None if a Loop collects the new tokens
    number: int | None
    part: str


def fits(g: Translator, k: Value, v: Value, causal: Any, sinks: Any) -> bool:
    """Whether the operator supports an attention: causal, over a cache that grows."""
    grows = k.appended is not None and v.appended is not None
    return g.settings.runtime == "ort" and grows and causal is True and sinks is None


def attention(
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
