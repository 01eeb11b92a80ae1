"""Embeddings that are scaled where they are looked up, as Gemma 3's and BART's are.

The factor belongs to the module of the table, as in the original. So calling that module gives what
`inputs_embeds` are: rows that are scaled already.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.types import type_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Scale:
    """The factor of a table's rows: a number, or the name of a weight without dimensions.

    `converted` says that the weight is converted to the dtype of the rows before the product.
    """

    value: float | str
    converted: bool = False


def scales(program: Program) -> dict[str, Scale]:
    """Return the factors of tables whose rows an original's module scales, by the table's name.

    A table has one where the same factor follows every lookup. A factor that is a weight scales one
    table and does nothing else.
    """
    if not program.origin.scales_embeddings:
        return {}
    uses: dict[str, set[Scale | None]] = {}
    products = set()
    for _, graph in program.graphs():
        for lookup in graph.find_nodes(op="call_function", target=aten.embedding.default):
            table = lookup.args[0]
            if isinstance(table, fx.Node) and table.op == "get_attr":
                scale = _scale(lookup)
                products |= set(lookup.users) if scale else set()
                uses.setdefault(str(table.target), set()).add(scale)
    found = {name: one for name, each in uses.items() if (one := _only(each)) is not None}
    names = [scale.value for scale in found.values() if isinstance(scale.value, str)]
    return {
        table: scale
        for table, scale in found.items()
        if isinstance(scale.value, float)
        or (names.count(scale.value) == 1 and _readers(program, scale.value) <= products)
    }


def _only(values: set[Scale | None]) -> Scale | None:
    return next(iter(values)) if len(values) == 1 else None


def _scale(lookup: fx.Node) -> Scale | None:
    """Return the factor of the product that alone reads a lookup."""
    product = next(iter(lookup.users), None)
    if product is None or len(lookup.users) > 1 or product.target is not aten.mul.Tensor:
        return None
    first, factor = product.args
    if first is not lookup:
        return None
    if isinstance(factor, int | float):
        return Scale(float(factor))
    if not isinstance(factor, fx.Node):
        return None
    converted = factor.target is aten.to.dtype
    weight = factor.args[0] if converted else factor
    type_ = type_of(weight)
    if not isinstance(weight, fx.Node) or weight.op != "get_attr" or type_ is None or type_.shape:
        return None
    return Scale(str(weight.target), converted)


def _readers(program: Program, name: str) -> set[fx.Node]:
    """Return the nodes that read a weight, or what it is converted to."""
    readers = set()
    for _, graph in program.graphs():
        for node in graph.find_nodes(op="get_attr", target=name):
            for user in node.users:
                readers |= set(user.users) if user.target is aten.to.dtype else {user}
    return readers
