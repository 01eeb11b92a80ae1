"""Lower attention to the Attention operator, with a mask that is computed once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from reroll.errors import ExportError
from reroll.export.onnx.graph import TARGET, Value
from reroll.export.onnx.ops import masks, windows
from reroll.export.onnx.ops.arguments import Varying
from reroll.export.onnx.ops.heads import fits_grouped, grouped_attention
from reroll.rewrite.ir.lowerings import lowering
from reroll.rewrite.ir.matching import argument, bind, shape
from reroll.rewrite.ir.ops import ATTENTION, ATTENTION_MASS
from reroll.rewrite.ir.visibility import Visibility

if TYPE_CHECKING:
    from reroll.export.onnx.emit.translate import Translator

INT, BOOL, FLOAT = torch.int64, torch.bool, torch.float32


@lowering(TARGET, "reroll::attention.default")
def attention(g: Translator, node: fx.Node, *args: Any, **kwargs: Any) -> Value:
    """Lower softmax attention, `reroll.rewrite.ir.ops.attention`.

    The result is [batch, time, heads, v_head_dim].
    """
    given, dtype = bind(ATTENTION, args, kwargs), g.dtype(node)
    limits, scale = Visibility.among(given), given["scale"]
    softcap, sinks = given["softcap"], given["sinks"]
    if limits.is_empty:
        zero = g.number(0.0, dtype)
        return g.op("Expand", zero, g.shape(node.meta["type"].shape))
    mask, length, keys = _mask(g, node, dtype, given, limits)
    q, k, v = (g.tensor(given[name], dtype) for name in ("q", "k", "v"))
    if fits_grouped(g, k, v, limits.causal, sinks):
        made = grouped_attention(g, node, q, k, v, scale, mask, softcap, keys)
        return _if_any(g, made, limits)
    if sinks is None and softcap is None:
        if mask is not None:
            mask = g.op("Expand", mask, g.shape([1, 1, length, keys]))
        made = g.op("Attention", q, k, v, mask, scale=scale)
    else:
        scores = _scores(g, node, q, k, scale, mask, softcap, sinks)
        weights = g.op("Softmax", scores, axis=-1)
        if sinks is not None:
            weights = g.op("Slice", weights, g.ints(0), g.ints(-1), g.ints(-1), g.ints(1))
        made = g.op("MatMul", weights, _repeated(g, node, v, "v"))
    made = g.op("Transpose", made, perm=[0, 2, 1, 3])
    return _if_any(g, made, limits)


def _if_any(g: Translator, made: Value, limits: Visibility) -> Value:
    """Return zeros in trips whose window is 0."""
    window = limits.window
    if limits.prefix or not isinstance(window, Varying) or 0 not in window.values:
        return made
    sees = g.op("Greater", masks.reach(g, window), g.number(0, INT), dtype=BOOL)
    return g.op("Where", sees, made, g.number(0.0, made.dtype), dtype=made.dtype)


@lowering(TARGET, "aten::scaled_dot_product_attention.default")
def scaled_dot_product_attention(
    g: Translator,
    node: fx.Node,
    q: Any,
    k: Any,
    v: Any,
    mask: Any = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Value:
    """Lower attention outside of layers' own op: [batch, heads, time, d] in and out."""
    dtype = g.dtype(node)
    if len(shape(node)) != 4:
        raise ExportError(
            "scaled_dot_product_attention of anything but [batch, heads, time, d] has no lowering",
            hint="give it a batch and heads",
        )
    if mask is not None:
        mask = g.tensor(mask)
        mask = mask if mask.dtype == BOOL else g.cast(mask, dtype)
        queries, keys = shape(argument(node, "query"))[2], shape(argument(node, "key"))[2]
        mask = g.op("Expand", mask, g.shape([1, 1, queries, keys]))
    q, k, v = (g.tensor(x, dtype) for x in (q, k, v))
    return g.op("Attention", q, k, v, mask, scale=scale, is_causal=int(is_causal))


@lowering(TARGET, "reroll::attention_mass.default")
def attention_mass(g: Translator, node: fx.Node, *args: Any, **kwargs: Any) -> Value:
    """Lower the denominator of a softmax, `reroll.rewrite.ir.ops.attention_mass`.

    The result is [batch, time, heads].
    """
    given = bind(ATTENTION_MASS, args, kwargs)
    mask, *_ = _mask(g, node, FLOAT, given, Visibility.among(given))
    q, k = (g.tensor(given[name], FLOAT) for name in ("q", "k"))
    scores = _scores(g, node, q, k, given["scale"], mask, given["softcap"], given["sinks"])
    if given["log"]:
        mass = g.op("ReduceLogSumExp", scores, g.ints(-1), keepdims=0)
        return g.op("Transpose", mass, perm=[0, 2, 1])
    highest = g.op("ReduceMax", scores, g.ints(-1), keepdims=1)
    mass = g.op("ReduceSum", g.op("Exp", g.op("Sub", scores, highest)), g.ints(-1), keepdims=0)
    return g.op("Transpose", mass, perm=[0, 2, 1])


def _mask(
    g: Translator, node: fx.Node, dtype: torch.dtype, given: dict[str, Any], limits: Visibility
) -> tuple[Value | None, Any, Any]:
    """Return the additive mask, or None, and the numbers of queries and keys."""
    length, keys = shape(argument(node, "q"))[2], shape(argument(node, "k"))[2]
    columns = g.tensor(given["k"]).columns
    if columns is not None:
        keys = windows.count(g, columns)
        padding = limits.padding
        padding = g.tensor(padding) if padding is not None else windows.padding_of(g)
        keep: Value | None = windows.visible(g, columns, limits.window, padding)
    else:
        keep = masks.visible(g, limits, length, keys)
    mask = None if keep is None else masks.additive(g, dtype, keep)
    bias = given["bias"]
    if bias is not None:
        dims = shape(argument(node, "bias"))
        bias = g.tensor(bias, dtype)
        if len(dims) < 4:
            bias = g.op("Unsqueeze", bias, g.ints(*range(4 - len(dims))))
        mask = bias if mask is None else g.op("Add", bias, mask)
    return mask, length, keys


def _scores(
    g: Translator,
    node: fx.Node,
    q: Value,
    k: Value,
    scale: float,
    mask: Value | None,
    softcap: float | None,
    sinks: Any,
) -> Value:
    """Compute explicit scores, where the operator lacks an option: [batch, heads, time, keys].

    Sinks are a last column.
    """
    batch, heads, length, _ = shape(argument(node, "q"))
    k = _repeated(g, node, k, "k")
    scores = g.op("MatMul", q, g.op("Transpose", k, perm=[0, 1, 3, 2]))
    scores = g.op("Mul", scores, g.number(scale, q.dtype))
    if softcap is not None:
        bound = g.number(softcap, q.dtype)
        scores = g.op("Mul", g.op("Tanh", g.op("Div", scores, bound)), bound)
    if mask is not None:
        scores = g.op("Add", scores, mask)
    if sinks is None:
        return scores
    column = g.op("Reshape", g.tensor(sinks, q.dtype), g.ints(1, heads, 1, 1))
    column = g.op("Expand", column, g.shape([batch, heads, length, 1]))
    return g.op("Concat", scores, column, axis=-1)


def _repeated(g: Translator, node: fx.Node, x: Value, name: str) -> Value:
    """Repeat keys or values for each query head."""
    heads = shape(argument(node, "q"))[1]
    batch, kv_heads, _, width = shape(argument(node, name))
    if heads == kv_heads:
        return x
    x = g.op("Unsqueeze", x, g.ints(2))
    x = g.op("Expand", x, g.ints(1, 1, int(heads) // int(kv_heads), 1, 1))
    return g.op("Reshape", x, g.shape([batch, heads, -1, width]))
