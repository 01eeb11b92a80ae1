"""Low-rank terms of linear layers, matched in the graph: W x + B (A x)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from reroll.rewrite.ir.matching import argument, is_weight
from reroll.rewrite.ir.program import Program

LINEAR = torch.ops.aten.linear.default
ADD = torch.ops.aten.add.Tensor


@dataclass(frozen=True)
class LowRankTerm:
    """Linear nodes of W x (with or without bias), of A x and of B (A x).

    `whole` is W x, or a sum of W x and low-rank terms where there are several.
    """

    whole: fx.Node
    down: fx.Node
    up: fx.Node

    @property
    def base(self) -> fx.Node:
        """The linear node of W x, without any low-rank term."""
        inner = low_rank_term(self.whole)
        return self.whole if inner is None else inner.base


def low_rank_term(node: Any) -> LowRankTerm | None:
    """Match the low-rank term that a node adds to a linear layer of the same input; else None."""
    if not isinstance(node, fx.Node) or node.target is not ADD:
        return None
    if len(node.args) != 2 or node.kwargs:
        return None
    for whole, up in (node.args, node.args[::-1]):
        down = up.args[0] if _is_layer(up, bias=False) else None  # type: ignore[union-attr]
        if not isinstance(whole, fx.Node) or not _is_layer(down, bias=False):
            continue
        term = LowRankTerm(whole, down, up)  # type: ignore[arg-type]
        base = term.base
        if _is_layer(base) and base.args[0] is down.args[0]:  # type: ignore[union-attr]
            return term
    return None


def factor_names(program: Program) -> dict[str, list[tuple[str, str]]]:
    """Map the name of each weight W to the names of its low-rank factors (A, B)."""
    found: dict[str, list[tuple[str, str]]] = {}
    for _, graph in program.graphs():
        for node in graph.nodes:
            term = low_rank_term(node)
            if term is not None:
                layers = (term.base, term.down, term.up)
                weight, *factors = (str(argument(n, "weight").target) for n in layers)
                found.setdefault(weight, []).append((factors[0], factors[1]))
    return found


def _is_layer(node: Any, bias: bool = True) -> bool:
    """Whether a node is a linear layer with a weight; if not `bias`, one without a bias."""
    if not isinstance(node, fx.Node) or node.target is not LINEAR:
        return False
    return is_weight(argument(node, "weight")) and (bias or argument(node, "bias") is None)
