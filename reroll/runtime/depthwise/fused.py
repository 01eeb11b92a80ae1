"""Parts of a graph that a kernel does in one launch, where the dispatcher takes kernels.

A linear layer with its low-rank term, whose rows may be in different trips; and the scores of exits
that come from a head's logits, which are then never in memory.
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
    """The rows of a batch by the trips they are in, as kernels take them.

    `order` are the trips of its segments and `sizes` their rows; `stacked` gives a weight of all
    trips [trips, ...] by its name.
    """

    def __init__(
        self, order: Sequence[int], sizes: Sequence[int], stacked: Callable[[str], Tensor]
    ) -> None:
        self.order, self.sizes, self.stacked = order, sizes, stacked
        self._tables: tuple[Tensor, Tensor, Tensor] | None = None

    def tables(self, trips: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """The trip of each row, and what `depth_lora` takes of them; made on the host, which knows
        the trips, and once.
        """
        if self._tables is None:
            from reroll.kernels.depth_lora import ROWS, tiles_by_depth

            depth = torch.tensor(self.order).repeat_interleave(torch.tensor(self.sizes))
            order, table = tiles_by_depth(depth, trips, ROWS)
            self._tables = depth.to(device), order.to(device), table.to(device)
        return self._tables


@dataclass(frozen=True)
class LowRank:
    """x W^T + (x A^T) B^T, with nodes for x and names of weights; `inside` are nodes of it alone.

    `bias` is a name, or empty.
    """

    x: fx.Node
    weight: str
    bias: str
    down: str
    up: str
    inside: tuple[fx.Node, ...] = field(repr=False)

    def runs(self, weight: Callable[[str], Any]) -> bool:
        """Whether a kernel does it, for weights as a batch has them: W is to be shared."""
        down = weight(self.down)
        rank = len(down if isinstance(down, Tensor) else down.values[0])
        found = weight(self.weight)
        return isinstance(found, Tensor) and dispatch.runs("depth_lora", found, rank)

    def run(self, x: Tensor, weight: Callable[[str], Any], depths: Depths) -> Tensor:
        """[rows, 1, N] from x [rows, 1, K]."""
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
    """How sure a head is: `margin` or `entropy`, as `insert_exits` has them."""

    x: fx.Node
    weight: str
    criterion: str
    inside: tuple[fx.Node, ...] = field(repr=False)

    def runs(self, weight: Callable[[str], Any]) -> bool:
        """Whether a kernel does it, for weights as a batch has them: the head is to be shared."""
        found = weight(self.weight)
        return isinstance(found, Tensor) and dispatch.runs("confidence", found)

    def run(self, x: Tensor, weight: Callable[[str], Any], depths: Depths) -> Tensor:
        """[rows, 1] from hidden states [rows, 1, K]."""
        from reroll.kernels import layers
        from reroll.kernels.forms import precision

        head = weight(self.weight)
        _, lead, entropy, _ = layers.confidence(x.flatten(0, -2), head, precision())
        out = lead if self.criterion == "margin" else 1 - entropy / math.log(len(head))
        whole: Tensor = out.unflatten(0, x.shape[:-1])
        return whole


Site = LowRank | Score


def sites_of(nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> dict[fx.Node, Site]:
    """The parts that kernels could do, by the node whose value they give."""
    found = {}
    for node in nodes:
        site = _low_rank(node) or _margin(node) or _entropy(node)
        if site is not None and not set(site.inside) & set(outputs):
            found[node] = site
    return found


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
    """softmax, the first of its two highest less the second."""
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
    """1 + (the sum of p log p) / log(vocabulary)."""
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
    found = _score(node, "entropy", p, (part, total, product, p, log_p))
    size = None if found is None else found.inside[-1].meta["type"].shape[-1]
    same = isinstance(size, int) and part.args[1] == math.log(size)
    return found if same else None


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
    """The input of a linear layer and the names of its weight and bias; None if it is none."""
    if not isinstance(node, fx.Node) or node.target is not aten.linear.default or node.kwargs:
        return None
    x, *weights = node.args
    if not all(isinstance(w, fx.Node) and w.op == "get_attr" for w in weights):
        return None
    names = [str(w.target) for w in weights]  # type: ignore[union-attr]
    return x, names[0], names[1] if len(names) > 1 else ""


def _of(node: Any, target: Any, *rest: Any) -> Any:
    """The first argument of a call, if that is what it is; else None."""
    if not isinstance(node, fx.Node) or node.target is not target or node.kwargs:
        return None
    return node.args[0] if tuple(node.args[1:]) == rest else None


def _alone(inside: Sequence[fx.Node], node: fx.Node) -> bool:
    """Whether nothing but `node` depends on these."""
    return all(user is node or user in inside for n in inside for user in n.users)
