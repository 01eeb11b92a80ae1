"""Low-rank terms of linear layers, matched in the graph: W x + B (A x)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from reroll.errors import RerollError
from reroll.rewrite.ir.matching import argument, is_weight
from reroll.rewrite.ir.program import Loop, Program
from reroll.rewrite.ir.weights import Apply, Expr
from reroll.rewrite.ir.weights.expressions import Source

LINEAR = torch.ops.aten.linear.default
ADD = torch.ops.aten.add.Tensor


@dataclass(frozen=True)
class LowRankTerm:
    """A low-rank term and what it is added to.

    Attributes:
        add: the node of the sum.
        whole: the node that the term is added to: the linear layer W x, which may have a bias, or
            the sum of it and of other terms.
        down: the linear node A x.
        up: the linear node B (A x).
    """

    add: fx.Node
    whole: fx.Node
    down: fx.Node
    up: fx.Node

    @property
    def base(self) -> fx.Node:
        """The linear node of W x, without any low-rank term."""
        inner = low_rank_term(self.whole)
        return self.whole if inner is None else inner.base

    @property
    def factors(self) -> tuple[str, str]:
        """The names of the weights A and B."""
        return weight_name(self.down), weight_name(self.up)


def low_rank_term(node: Any) -> LowRankTerm | None:
    """Return the low-rank term that a node adds to a linear layer of the same input, if any."""
    if not isinstance(node, fx.Node) or node.target is not ADD:
        return None
    if len(node.args) != 2 or node.kwargs:
        return None
    for whole, up in (node.args, node.args[::-1]):
        down = up.args[0] if _is_layer(up, bias=False) else None  # type: ignore[union-attr]
        if not isinstance(whole, fx.Node) or not _is_layer(down, bias=False):
            continue
        term = LowRankTerm(node, whole, down, up)  # type: ignore[arg-type]
        base = term.base
        if _is_layer(base) and base.args[0] is down.args[0]:  # type: ignore[union-attr]
            return term
    return None


def low_rank_terms(graph: fx.Graph) -> list[LowRankTerm]:
    """Return all low-rank terms of a graph, in the order in which they are added."""
    return [term for node in graph.nodes if (term := low_rank_term(node)) is not None]


def factor_names(program: Program) -> dict[str, list[tuple[str, str]]]:
    """Return the names of the factors (A, B) of each weight's terms, by the name of the weight."""
    names: dict[str, list[tuple[str, str]]] = {}
    for _, graph in program.graphs():
        for term in low_rank_terms(graph):
            names.setdefault(weight_name(term.base), []).append(term.factors)
    return names


def ranks(program: Program, loop: Loop, term: LowRankTerm) -> tuple[int, ...]:
    """Return the rank of a term in each trip: 0 where its factor A is stored as zeros.

    Weights are read only where trips can differ. Where they cannot be read, the rank is that of the
    stored factor.
    """
    weight = program.weights[term.factors[0]]
    rank = int(weight.meta.shape[0])
    index = weight.index or (0,) * loop.trips
    blocks = program.weights[weight_name(term.base)].index or ()
    # a trip that has its block to itself has no residual, and neither has one out of the budget
    alone = any(blocks.count(block) == 1 for block in blocks)
    is_one_of_several = term.whole is not term.base
    empty: set[int] = set()
    if alone or is_one_of_several or len(weight.entries) < loop.trips:
        empty = {n for n, entry in enumerate(weight.entries) if is_zero(entry, program)}
    return tuple(0 if entry in empty else rank for entry in index)


def is_zero(expr: Expr, program: Program) -> bool:
    """Whether a weight is known to be zeros."""
    if isinstance(expr, Apply) and expr.op == "scale":
        return expr.args[-1] == 0.0
    if isinstance(expr, Apply) and expr.op == "zeros":
        return True
    if isinstance(expr, Source):
        try:
            return not bool(program.source.load(expr.name).any())
        except RerollError:
            return False
    return False


def weight_name(layer: fx.Node) -> str:
    """Return the name of the weight that a linear node multiplies by."""
    return str(argument(layer, "weight").target)


def _is_layer(node: Any, bias: bool = True) -> bool:
    """Whether a node is a linear layer with a weight; if not `bias`, one without a bias."""
    if not isinstance(node, fx.Node) or node.target is not LINEAR:
        return False
    weight = argument(node, "weight")
    if not isinstance(weight, fx.Node) or not is_weight(weight):
        return False
    return bias or argument(node, "bias") is None
