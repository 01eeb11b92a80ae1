"""Attention in a captured graph: rules that raise it, and masks absorbed into its arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from reroll.rewrite.capture.raising.eager import match_eager, match_sdpa, raise_eager, raise_sdpa
from reroll.rewrite.capture.raising.idioms import RewriteRule
from reroll.rewrite.ir.matching import argument, bind, shape
from reroll.rewrite.ir.ops import ATTENTION, MASK
from reroll.rewrite.ir.visibility import Visibility

aten = torch.ops.aten

ARGUMENTS = tuple(a.name for a in ATTENTION._schema.arguments)
ATTENTION_RULES = (
    RewriteRule("attention", match_eager, raise_eager),
    RewriteRule("attention", match_sdpa, raise_sdpa),
)


def attention_arguments(node: fx.Node) -> dict[str, Any]:
    """Return all arguments of an attention node, by name."""
    return bind(ATTENTION, node.args, node.kwargs)


def set_arguments(node: fx.Node, arguments: dict[str, Any]) -> None:
    """Set an attention node's arguments: q, k, v and scale by position, others by name."""
    defaults = {
        a.name: a.default_value for a in ATTENTION._schema.arguments if a.has_default_value()
    }
    node.args = tuple(arguments[name] for name in ARGUMENTS[:4])
    node.kwargs = {
        name: value
        for name, value in arguments.items()
        if name in defaults and (isinstance(value, fx.Node) or value != defaults[name])
    }


def absorb_masks(graph: fx.Graph) -> None:
    """Replace masks that attentions add to their scores by arguments of the attention ops."""
    for node in list(graph.nodes):
        if node.target is not ATTENTION:
            continue
        arguments = attention_arguments(node)
        terms = _terms(arguments["bias"])
        masks = [t for t in map(_mask_behind, terms) if t is not None]
        if len(masks) == 1 and _covers(masks[0], node):
            rest = [t for t in terms if _mask_behind(t) is None]
            arguments["bias"] = _sum(graph, node, rest)
            arguments |= vars(Visibility.of(masks[0]))
        set_arguments(node, arguments)
    graph.eliminate_dead_code()


def _terms(bias: Any) -> list[fx.Node]:
    """Return the summands of a bias."""
    if bias is None:
        return []
    plain = bias.target is aten.add.Tensor and len(bias.args) == 2 and not bias.kwargs
    if plain and all(isinstance(a, fx.Node) for a in bias.args):
        return [term for a in bias.args for term in _terms(a)]
    return [bias]


def _mask_behind(node: fx.Node) -> fx.Node | None:
    """Return the mask op behind full slices, casts and expansions; None if there is none."""
    while node.target in (aten.slice.Tensor, aten.to.dtype, aten.expand.default):
        inner: Any = node.args[0]
        if node.target is aten.slice.Tensor and shape(inner) != shape(node):
            return None
        node = inner
    return node if node.target is MASK else None


def _covers(mask: fx.Node, attention: fx.Node) -> bool:
    """Whether a mask has exactly the queries and keys of an attention."""
    q, k = argument(attention, "q"), argument(attention, "k")
    return shape(mask)[2:] == (shape(q)[2], shape(k)[2])


def _sum(graph: fx.Graph, before: fx.Node, terms: list[fx.Node]) -> fx.Node | None:
    total: fx.Node | None = None
    for term in terms:
        if total is None:
            total = term
        else:
            with graph.inserting_before(before):
                total = graph.call_function(aten.add.Tensor, (total, term))
    return total
