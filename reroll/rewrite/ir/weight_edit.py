"""Editing a Program's weights beside its graph: who reads them, and new ones made of them."""

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
    """The weight table of a Program whose graphs are being edited in place.

    Attributes:
        program: the Program; its graphs are the caller's to change.
        weights: the table as changed so far.
        reference: what tied weights were before they were tied, changed alike.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.weights = program.weights
        self.reference = program.reference

    def result(self) -> Program:
        """The Program with the changed table, without what no graph reads any more."""
        for _, graph in self.program.graphs():
            graph.eliminate_dead_code()
        return replace(self.program, weights=self.weights, reference=self.reference).pruned()

    def owns(self, user: fx.Node | None, *values: Any) -> bool:
        """Whether values are weights that nothing but `user` reads, by their node, name or content.

        Without a user, whether they are weights that one node has.
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
        """Whether another weight has the same content: changing one would then untie the two."""
        own = set(self.weights[name].entries)
        return any(own & set(w.entries) for other, w in self.weights.items() if other != name)

    def fits(self, name: str, *others: str) -> bool:
        """Whether a weight can take others in and need no more entries than it has.

        Before tying, too, they must have had a form that can be taken in alike.
        """
        stacks = [self.weights[n].index for n in (name, *others)]
        combined = set(zip(*(index for index in stacks if index is not None), strict=True))
        alike = len({n in self.reference for n in (name, *others)}) == 1
        return alike and len(combined) <= len(self.weights[name].entries)

    def change(self, name: str, function: Callable[[Expr], Expr]) -> None:
        """Apply a function to all entries of a weight, and to what it was before tying."""
        self.weights = self.weights.with_weight(name, _map(self.weights[name], function))
        if name in self.reference:
            self.reference = self.reference.with_weight(name, _map(self.reference[name], function))

    def combine(self, result: str, names: list[str], function: Callable[..., Expr]) -> None:
        """Make the weight `result` of several, trip by trip, in the dtype of the first.

        Where all of them have a form from before they were tied, that is made of theirs.
        """
        made = _combined([self.weights[name] for name in names], function)
        self.weights = self.weights.with_weight(result, made)
        if all(name in self.reference for name in names):
            made = _combined([self.reference[name] for name in names], function)
            self.reference = self.reference.with_weight(result, made)

    def copy(self, name: str, new: str) -> str:
        """Give a weight's content a second name, and so weights of its own; returns the name."""
        new = self.free_name(new)
        self.weights = self.weights.with_weight(new, self.weights[name])
        return new

    def free_name(self, name: str) -> str:
        """The name, or one like it that no weight has."""
        while name in self.weights:
            name += "_"
        return name

    def node(self, graph: fx.Graph, name: str) -> fx.Node:
        """A new node that reads a weight, at the graph's insertion point."""
        return Builder(graph).weight(name, self.weights[name])


def _map(weight: Weight, function: Callable[[Expr], Expr]) -> Weight:
    dtype = weight.meta.dtype
    return replace(weight, entries=tuple(cast(function(_wide(e)), dtype) for e in weight.entries))


def _combined(parts: list[Weight], function: Callable[..., Expr]) -> Weight:
    trips = next((p.trips for p in parts if p.trips is not None), None)
    dtype = parts[0].meta.dtype
    # trips share what they shared in all parts; equal constants of different trips stay apart
    made: dict[tuple[int, ...], Expr] = {}
    index = []
    for trip in range(trips or 1):
        used = tuple(p.index[trip] for p in parts if p.index is not None)
        if used not in made:
            made[used] = cast(function(*(_wide(p.for_trip(trip)) for p in parts)), dtype)
        index.append(list(made).index(used))
    own = None if trips is None else tuple(index)
    return Weight(tuple(made.values()), own, any(p.trainable for p in parts))


def _wide(expr: Expr) -> Expr:
    """In fp32 at least: half precision would round between the steps."""
    return cast(expr, torch.promote_types(expr.meta.dtype, torch.float32))
