"""Edit a Program's weights with its graphs: count their readers, and derive new weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from reroll.rewrite.ir.builder import Builder
from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.weights import Weight, cast
from reroll.rewrite.ir.weights.expressions import Expr


class WeightEditor:
    """Editor of the weight table of a Program whose graphs are edited in place.

    Attributes:
        program: the Program; the caller edits its graphs.
        weights: the table with the changes so far.
        reference: the tied weights from before they were tied, with the same changes.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.weights = program.weights
        self.reference = program.reference

    def result(self) -> Program:
        """Return the Program with the changed table, without weights that no graph reads."""
        for _, graph in self.program.graphs():
            graph.eliminate_dead_code()
        return replace(self.program, weights=self.weights, reference=self.reference).pruned()

    def owns(self, user: fx.Node | None, *values: Any) -> bool:
        """Whether values are weights that only `user` reads, by their node, name and content.

        Without a user: whether each is a weight that a single node reads.
        """
        counts = self._reads()
        return all(
            isinstance(value, fx.Node)
            and value.op == "get_attr"
            and (user is None or list(value.users) == [user])
            and counts[str(value.target)] == 1
            and not self._stored_twice(str(value.target))
            for value in values
        )

    def _reads(self) -> Counter[str]:
        graphs = (graph for _, graph in self.program.graphs())
        return Counter(str(n.target) for g in graphs for n in g.nodes if n.op == "get_attr")

    def _stored_twice(self, name: str) -> bool:
        """Whether another weight has the same content; changing one of them would untie them."""
        entries = set(self.weights[name].entries)
        return any(entries & set(w.entries) for other, w in self.weights.items() if other != name)

    def fits(self, name: str, *others: str) -> bool:
        """Whether other weights can be folded into a weight without more entries.

        Either all or none of them must have a form from before tying.
        """
        stacks = [self.weights[n].index for n in (name, *others)]
        combined = set(zip(*(index for index in stacks if index is not None), strict=True))
        alike = len({n in self.reference for n in (name, *others)}) == 1
        return alike and len(combined) <= len(self.weights[name].entries)

    def change(self, name: str, function: Callable[[Expr], Expr]) -> None:
        """Apply a function to all entries of a weight, and to its form from before tying."""
        self.weights = self.weights.with_weight(name, _map(self.weights[name], function))
        if name in self.reference:
            self.reference = self.reference.with_weight(name, _map(self.reference[name], function))

    def combine(self, result: str, names: list[str], function: Callable[..., Expr]) -> None:
        """Compute the weight `result` from several, trip by trip, in the dtype of the first.

        If all of them have a form from before tying, that of `result` is computed from theirs.
        """
        combined = _combined([self.weights[name] for name in names], function)
        self.weights = self.weights.with_weight(result, combined)
        if all(name in self.reference for name in names):
            combined = _combined([self.reference[name] for name in names], function)
            self.reference = self.reference.with_weight(result, combined)

    def copy(self, name: str, new: str) -> str:
        """Copy a weight under another name; return that name."""
        new = self.free_name(new)
        self.weights = self.weights.with_weight(new, self.weights[name])
        return new

    def free_name(self, name: str) -> str:
        """Return the name, with underscores appended until no weight has it."""
        while name in self.weights:
            name += "_"
        return name

    def node(self, graph: fx.Graph, name: str) -> fx.Node:
        """Write a node that reads a weight, at the graph's insertion point."""
        return Builder(graph).weight(name, self.weights[name])


def _map(weight: Weight, function: Callable[[Expr], Expr]) -> Weight:
    dtype = weight.meta.dtype
    return replace(weight, entries=tuple(cast(function(_wide(e)), dtype) for e in weight.entries))


def _combined(parts: list[Weight], function: Callable[..., Expr]) -> Weight:
    trips = next((p.trips for p in parts if p.trips is not None), None)
    dtype = parts[0].meta.dtype
    # trips share an entry only if they share it in all parts; equal constants stay separate
    expressions: dict[tuple[int, ...], Expr] = {}
    index = []
    for trip in range(trips or 1):
        used = tuple(p.index[trip] for p in parts if p.index is not None)
        if used not in expressions:
            expressions[used] = cast(function(*(_wide(p.for_trip(trip)) for p in parts)), dtype)
        index.append(list(expressions).index(used))
    shared_index = None if trips is None else tuple(index)
    return Weight(tuple(expressions.values()), shared_index, any(p.trainable for p in parts))


def _wide(expr: Expr) -> Expr:
    """Cast to fp32 at least, because half precision would round between the steps."""
    return cast(expr, torch.promote_types(expr.meta.dtype, torch.float32))
