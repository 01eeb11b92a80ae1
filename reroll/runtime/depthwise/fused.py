"""Parts of a graph that one kernel launch can compute, where the dispatcher chooses kernels.

These are a linear layer with its low-rank residual, whose rows may be in different trips, and exit
scores of a head's logits. The kernel for scores never writes the logits to memory.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from reroll.kernels import dispatch
from reroll.rewrite.analysis.low_rank import low_rank_term
from reroll.rewrite.ir.ops import WIDEN

aten: Any = torch.ops.aten


class Depths:
    """Trips of the rows of a batch, as kernels take them.

    `order` are the trips of its segments, and `sizes` their numbers of rows. `stacked` returns a
    weight of all trips [trips, ...] by name.
    """

    def __init__(
        self, order: Sequence[int], sizes: Sequence[int], stacked: Callable[[str], Tensor]
    ) -> None:
        self.order, self.sizes, self.stacked = order, sizes, stacked
        self._tables: tuple[Tensor, Tensor, Tensor] | None = None

    def tables(self, trips: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return the trip of each row, and the two tables that `depth_lora` takes.

        They are computed once, on the host, which knows the trips.
        """
        if self._tables is None:
            from reroll.kernels.depth_lora import ROWS, tiles_by_depth

            depth = torch.tensor(self.order).repeat_interleave(torch.tensor(self.sizes))
            order, table = tiles_by_depth(depth, trips, ROWS)
            self._tables = depth.to(device), order.to(device), table.to(device)
        return self._tables


@dataclass(frozen=True)
class LowRank:
    """A linear layer with a low-rank residual: x W^T + (x A^T) B^T.

    `x` is a node; the others are names of weights, `bias` possibly empty. `inside` are nodes whose
    values nothing else uses.
    """

    x: fx.Node
    weight: str
    bias: str
    down: str
    up: str
    inside: tuple[fx.Node, ...] = field(repr=False)

    def runs(self, weight: Callable[[str], Any]) -> bool:
        """Whether a kernel computes it for the weights of a batch: all rows must share W."""
        down = weight(self.down)
        rank = len(down if isinstance(down, Tensor) else down.values[0])
        base = weight(self.weight)
        return isinstance(base, Tensor) and dispatch.runs("depth_lora", base, rank)

    def run(self, x: Tensor, weight: Callable[[str], Any], depths: Depths) -> Tensor:
        """Compute the outputs [rows, 1, N] of x [rows, 1, K]."""
        from reroll.kernels import layers
        from reroll.kernels.forms import precision

        down, up = depths.stacked(self.down), depths.stacked(self.up)
        depth, order, table = depths.tables(len(down), x.device)
        out: Tensor = layers.depth_lora(
            x.flatten(0, -2), weight(self.weight), down, up, order, table, precision()
        )
        if self.bias:
            bias = weight(self.bias)
            out = out + (bias if isinstance(bias, Tensor) else depths.stacked(self.bias)[depth])
        whole: Tensor = out.unflatten(0, x.shape[:-1])
        return whole


@dataclass(frozen=True)
class Score:
    """Confidence of a head by `criterion`: `margin` or `entropy`, as in `insert_exits`."""

    x: fx.Node
    weight: str
    criterion: str
    inside: tuple[fx.Node, ...] = field(repr=False)

    def runs(self, weight: Callable[[str], Any]) -> bool:
        """Whether a kernel computes it for the weights of a batch: all rows must share the head."""
        head = weight(self.weight)
        return isinstance(head, Tensor) and dispatch.runs("confidence", head)

    def run(self, x: Tensor, weight: Callable[[str], Any], depths: Depths) -> Tensor:
        """Compute the scores [rows, 1] of hidden states [rows, 1, K]."""
        from reroll.kernels import layers
        from reroll.kernels.forms import precision

        head = weight(self.weight)
        _, lead, entropy, _ = layers.confidence(x.flatten(0, -2), head, precision())
        out = lead if self.criterion == "margin" else 1 - entropy / math.log(len(head))
        whole: Tensor = out.unflatten(0, x.shape[:-1])
        return whole


Fusion = LowRank | Score


def fusions_of(nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> dict[fx.Node, Fusion]:
    """Find the parts that kernels can compute, by the node of their result."""
    fusions = {}
    for node in nodes:
        fusion = _low_rank(node) or _margin(node) or _entropy(node)
        if fusion is not None and not set(fusion.inside) & set(outputs):
            fusions[node] = fusion
    return fusions


def _low_rank(node: fx.Node) -> LowRank | None:
    term = low_rank_term(node)
    if term is None or term.base is not term.whole:
        return None
    inside = (term.whole, term.up, term.down)
    parts = [_linear(layer) for layer in inside]
    if not all(parts) or not _alone(inside, node):
        return None
    (x, weight, bias), (_, up, _), (_, down, _) = parts
    return LowRank(x, weight, bias, down, up, inside)


def _margin(node: fx.Node) -> Score | None:
    """Match softmax, and its highest value minus the second highest."""
    if node.target is not aten.sub.Tensor or len(node.args) != 2:
        return None
    picks: Any = node.args
    if any(_of(p, aten.select.int, -1, i) is None for i, p in enumerate(picks)):
        return None
    best = picks[0].args[0]
    top = _of(best, operator.getitem, 0)
    p = _of(top, aten.topk.default, 2)
    if picks[1].args[0] is not best or p is None:
        return None
    return _score(node, "margin", p, (*picks, best, top, p))


def _entropy(node: fx.Node) -> Score | None:
    """Match 1 + (the sum of p log p) / log(vocabulary)."""
    part = _of(node, aten.add.Tensor, 1.0)
    if part is None or part.target is not aten.div.Tensor:
        return None
    total: Any = part.args[0]
    product = _of(total, aten.sum.dim_IntList, [-1])
    if product is None or product.target is not aten.mul.Tensor:
        return None
    p, log_p = product.args
    if _of(log_p, aten.log_softmax.int, -1) is not _of(p, aten.softmax.int, -1):
        return None
    score = _score(node, "entropy", p, (part, total, product, p, log_p))
    size = None if score is None else score.inside[-1].meta["type"].shape[-1]
    same = isinstance(size, int) and part.args[1] == math.log(size)
    return score if same else None


def _score(node: fx.Node, criterion: str, p: Any, inside: tuple[Any, ...]) -> Score | None:
    logits = _of(p, aten.softmax.int, -1)
    wide = _of(logits, aten.to.dtype, torch.float32) or _of(logits, WIDEN)
    if wide is not None:
        inside, logits = (*inside, logits), wide
    head = _linear(logits)
    inside = (*inside, logits)
    if head is None or head[2] or not _alone(inside, node):
        return None
    return Score(head[0], head[1], criterion, inside)


def _linear(node: Any) -> Any:
    """Return the input of a linear layer and its weight and bias names; None for other nodes."""
    if not isinstance(node, fx.Node) or node.target is not aten.linear.default or node.kwargs:
        return None
    x, *weights = node.args
    if not all(isinstance(w, fx.Node) and w.op == "get_attr" for w in weights):
        return None
    names = [str(w.target) for w in weights]  # type: ignore[union-attr]
    return x, names[0], names[1] if len(names) > 1 else ""


def _of(node: Any, target: Any, *rest: Any) -> Any:
    """Return the first argument of a call of `target` with other arguments `rest`, else None."""
    if not isinstance(node, fx.Node) or node.target is not target or node.kwargs:
        return None
    return node.args[0] if tuple(node.args[1:]) == rest else None


def _alone(inside: Sequence[fx.Node], node: fx.Node) -> bool:
    """Whether no node but `node` and these themselves reads their values."""
    return all(user is node or user in inside for n in inside for user in n.users)
