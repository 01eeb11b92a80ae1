"""Raise attention that a model writes out itself: softmax(q k^T * scale + bias) v.

The search starts at the product with the values. It goes back through the softmax and all ops on
the scores to the product of queries and keys. On the way it collects scale, soft cap, biases and
masks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from reroll.rewrite.ir.builder import Builder
from reroll.rewrite.ir.matching import all_arguments, argument, dtype, shape
from reroll.rewrite.ir.ops import ATTENTION, MASK
from reroll.rewrite.ir.patterns import Match, Miss
from reroll.rewrite.ir.records import TensorType
from reroll.rewrite.ir.types import set_type, type_of

aten = torch.ops.aten

PRODUCTS = (aten.matmul.default, aten.bmm.default)
SOFTMAX = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
_FILLS = (aten.masked_fill.Scalar, aten.masked_fill.Tensor)
_WHERES = (aten.where.self, aten.where.ScalarOther)
_RESHAPES = (aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int)


@dataclass
class Scores:
    """Scale, soft cap, biases and masks found on the way to the product of queries and keys."""

    scale: float = 1.0
    softcap: float | None = None
    # terms added to the scores, each with the factor by which later ops multiply it
    terms: list[tuple[fx.Node, float]] = field(default_factory=list)
    # conditions, with True if a score counts where they hold, or False if it is masked out there
    kept: list[tuple[fx.Node, bool]] = field(default_factory=list)
    nodes: list[str] = field(default_factory=list)


def match_eager(root: fx.Node) -> Match | Miss:
    """Match an attention whose last node is the product `root` of weights and values."""
    if root.target not in PRODUCTS:
        return Miss(f"{root.name} is not a product", (root.name,), "eager attention")
    scores = Scores(nodes=[root.name])
    weights = _strip(root.args[0], scores, (aten.to.dtype, *_RESHAPES))
    if weights.target not in SOFTMAX:
        return Miss(
            "the left factor is not the result of a softmax", (root.name,), "eager attention", 1
        )
    if all_arguments(weights)[1] not in (-1, len(shape(weights)) - 1):
        return Miss("the softmax is not over the keys", (weights.name,), "eager attention", 2)
    scores.nodes.append(weights.name)
    product = _scores(weights.args[0], scores)
    if isinstance(product, Miss):
        return product
    q, transposed = product
    k = _untransposed(transposed, scores)
    if k is None:
        return Miss("the keys are not transposed", (transposed.name,), "eager attention", 4)
    v = _heads(root.args[1], scores)
    q, k = _heads(q, scores), _heads(k, scores)  # type: ignore[assignment]
    if q is None or k is None or v is None:
        return Miss("batch and heads cannot be separated", (root.name,), "eager attention", 5)
    k, v = _unrepeated(k, scores), _unrepeated(v, scores)
    if shape(k)[1] != shape(v)[1]:
        return Miss("keys and values differ in heads", (k.name, v.name), "eager attention", 6)
    bound = {"q": q, "k": k, "v": v, "scores": scores}
    bound |= {f"term{i}": node for i, (node, _) in enumerate(scores.terms)}
    bound |= {f"kept{i}": node for i, (node, _) in enumerate(scores.kept)}
    return Match("eager attention", bound, tuple(scores.nodes))


def raise_eager(graph: fx.Graph, root: fx.Node, match: Match) -> fx.Node | Miss:
    """Build the attention node for a match, in the layout of the product that it replaces."""
    q, k, v, scores = (match[name] for name in ("q", "k", "v", "scores"))
    # a model may compute its scores in fp32 and the product with the values in half precision
    v = _converted(graph, v, dtype(q))
    bias = _bias(graph, q, scores)
    attention = ATTENTION
    kwargs: dict[str, Any] = {}
    if scores.softcap is not None:
        kwargs["softcap"] = scores.softcap
    if bias is not None:
        kwargs["bias"] = bias
    build = Builder(graph)
    out = build.call(
        aten.transpose.int, build.call(attention, q, k, v, scores.scale, **kwargs), 1, 2
    )
    out = _converted(graph, out, dtype(root))
    if len(shape(root)) == 3:
        out = graph.call_function(aten.flatten.using_ints, (out, 0, 1))
        out.meta.update(root.meta)
    return out


def _converted(graph: fx.Graph, node: fx.Node, wanted: torch.dtype | None) -> fx.Node:
    if None in (wanted, dtype(node)) or dtype(node) == wanted:
        return node
    return Builder(graph).call(aten.to.dtype, node, wanted)


def _strip(value: Any, scores: Scores, targets: tuple[Any, ...]) -> fx.Node:
    """Skip ops of these targets, which join the region, and return the value before them."""
    while isinstance(value, fx.Node) and value.target in targets:
        scores.nodes.append(value.name)
        value = value.args[0]
    return value  # type: ignore[no-any-return]


def _scores(value: Any, scores: Scores) -> tuple[fx.Node, fx.Node] | Miss:
    """Walk from the softmax's input to the product of queries and keys; return its factors."""
    factor, outside = 1.0, 0
    while isinstance(value, fx.Node):
        target, kwargs = value.target, value.kwargs
        args: tuple[Any, ...] = value.args
        scores.nodes.append(value.name)
        if target in PRODUCTS:
            scores.scale = factor
            product = args[0], args[1]
            break
        if target is aten.baddbmm.default:
            beta, alpha = (argument(value, name) for name in ("beta", "alpha"))
            scores.terms.append((args[0], factor * beta))
            scores.scale = factor * alpha
            product = args[1], args[2]
            break
        masked = _masked(value, scores)
        if target in (aten.to.dtype, *_RESHAPES):
            value = args[0]
        elif target in (aten.mul.Tensor, aten.div.Tensor) and isinstance(args[1], (int, float)):
            factor = factor * args[1] if target is aten.mul.Tensor else factor / args[1]
            value = args[0]
        elif target is aten.add.Tensor and not kwargs and isinstance(args[1], fx.Node):
            inner = 0 if _leads_to_product(args[0]) else 1
            scores.terms.append((args[1 - inner], factor))
            value = args[inner]
        elif target is aten.tanh.default and scores.softcap is None and factor > 0:
            # factor * tanh(u) is a soft cap of `factor` on the scores factor * u
            scores.softcap, outside = factor, len(scores.terms) + len(scores.kept)
            value = args[0]
        elif masked is not None:
            value, condition, keep = masked
            scores.kept.append((condition, keep))
        else:
            return Miss(
                f"{target} is not supported between scores and softmax",
                (value.name,),
                "eager attention",
                3,
            )
    else:
        return Miss("the scores are no product", (), "eager attention", 3)
    if scores.softcap is not None and len(scores.terms) + len(scores.kept) > outside:
        return Miss(
            "a mask or bias is added before the soft cap", (value.name,), "eager attention", 3
        )
    return product


def _leads_to_product(value: Any) -> bool:
    """Whether a summand is computed from queries and keys, and not a bias."""
    return not isinstance(_scores(value, Scores()), Miss)


def _masked(node: fx.Node, scores: Scores) -> tuple[Any, fx.Node, bool] | None:
    """Return the scores that a node masks, the condition, and whether they count where it holds."""
    args: tuple[Any, ...] = node.args
    if node.target in _FILLS and _is_low(args[2], scores):
        return args[0], _mask_behind(args[1], scores), False
    if node.target in _WHERES and _is_low(args[2], scores):
        return args[1], args[0], True
    return None


def _is_low(value: Any, scores: Scores) -> bool:
    """Whether a constant masks a score out: it is -1e4 or less, such as a dtype's minimum."""
    if isinstance(value, fx.Node):
        if value.target not in (aten.full.default, aten.scalar_tensor.default):
            return False
        scores.nodes.append(value.name)
        value = value.args[-1]
    return isinstance(value, (int, float)) and value <= -1e4


def _untransposed(value: fx.Node, scores: Scores) -> fx.Node | None:
    rank = len(shape(value))
    args: tuple[Any, ...] = value.args
    if value.target is aten.transpose.int:
        swapped = {d % rank for d in args[1:3]} == {rank - 1, rank - 2}
    elif value.target is aten.permute.default:
        # only the last two dimensions may be exchanged; heads stay where they are
        swapped = [d % rank for d in args[1]] == [*range(rank - 2), rank - 1, rank - 2]
    else:
        return None
    if not swapped:
        return None
    scores.nodes.append(value.name)
    return args[0]  # type: ignore[no-any-return]


def _heads(value: Any, scores: Scores) -> fx.Node | None:
    """Return the [batch, heads, time, dim] form of a factor, also of one with both flattened."""
    if not isinstance(value, fx.Node):
        return None
    flat = len(shape(value)) == 3 and value.target in _RESHAPES
    inner: Any = value.args[0] if flat else None
    if flat and len(shape(inner)) == 4:
        scores.nodes.append(value.name)
        value = inner
    return value if isinstance(value, fx.Node) and len(shape(value)) == 4 else None


def _unrepeated(value: fx.Node, scores: Scores) -> fx.Node:
    """Return keys or values before the repetition of heads for grouped queries."""
    inner: Any = value.args[0] if value.args else None
    if value.target is aten.repeat_interleave.self_int and value.args[2] == 1:
        scores.nodes.append(value.name)
        return inner  # type: ignore[no-any-return]
    if value.target in _RESHAPES and inner.target is aten.expand.default:
        unsqueeze = inner.args[0]
        if unsqueeze.target is aten.unsqueeze.default and unsqueeze.args[1] == 2:
            scores.nodes += [value.name, inner.name, unsqueeze.name]
            return unsqueeze.args[0]  # type: ignore[no-any-return]
    return value


def _bias(graph: fx.Graph, q: fx.Node, scores: Scores) -> fx.Node | None:
    total: fx.Node | None = None
    low = torch.finfo(torch.float32).min
    build, terms = Builder(graph), list(scores.terms)
    for condition, keep in scores.kept:
        mask = condition
        if condition.target is not MASK:
            zero, lowest = (0.0, low) if keep else (low, 0.0)
            mask = build.call(aten.where.Scalar, condition, zero, lowest)
        terms.append((mask, 1.0))
    for node, factor in terms:
        if len(shape(node)) == 3 and len(shape(q)) == 4 and shape(node)[0] not in (1, shape(q)[1]):
            heads = shape(q)[1]
            batch, like = shape(q)[0], type_of(node)
            node = graph.call_function(aten.unflatten.int, (node, 0, [-1, heads]))
            if like is not None:
                set_type(node, TensorType(like.dtype, (batch, heads, *like.shape[1:])))
        if factor != 1.0 and node.target is not MASK:
            node = build.call(aten.mul.Tensor, node, factor)
        if total is None:
            total = node
        else:
            total = build.call(aten.add.Tensor, total, node)
    return total


def _mask_behind(condition: Any, scores: Scores) -> fx.Node:
    """Return the additive mask whose conversion to bool is the condition, else the condition."""
    inner, passed = condition, []
    while inner.target is aten.to.dtype:
        passed.append(inner.name)
        inner = inner.args[0]
    if inner.target is not MASK:
        return condition  # type: ignore[no-any-return]
    scores.nodes += passed
    return inner  # type: ignore[no-any-return]


def match_sdpa(root: fx.Node) -> Match | Miss:
    """Match the fused attention of torch."""
    if root.target is not aten.scaled_dot_product_attention.default:
        return Miss(f"{root.name} is no fused attention", (root.name,), "sdpa")
    q, k, v, _, dropout, causal, *_ = all_arguments(root)
    if len(shape(q)) != 4 or (causal and shape(q)[2] != shape(k)[2]):
        return Miss("the fused attention is not over heads", (root.name,), "sdpa", 1)
    if dropout:
        return Miss("the fused attention drops out", (root.name,), "sdpa", 1)
    return Match("sdpa", {"q": q, "k": k, "v": v}, (root.name,))


def raise_sdpa(graph: fx.Graph, root: fx.Node, match: Match) -> fx.Node | Miss:
    """Build the attention node for torch's fused attention, in its layout."""
    q, k, v, mask, _, causal, scale, _ = all_arguments(root)
    build = Builder(graph)
    kwargs: dict[str, Any] = {"causal": True} if causal else {}
    if mask is not None:
        if dtype(mask) == torch.bool:
            low = torch.finfo(torch.float32).min
            mask = build.call(aten.where.Scalar, mask, 0.0, low)
        kwargs["bias"] = mask
    width = shape(q)[-1]
    if scale is None:
        if not isinstance(width, int):
            return Miss("the size of a head is not known", (root.name,), "sdpa", 2)
        scale = width**-0.5
    attention = ATTENTION
    node = build.call(attention, q, k, v, float(scale), **kwargs)
    return build.call(aten.transpose.int, node, 1, 2)
