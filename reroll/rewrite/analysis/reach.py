"""Limits of a Program's inputs: rows of learned position tables, and ids outside of tables.

A table of positions has one row for each position, so it bounds the length of a text. Rotary
embeddings and biases by distance have no such bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, fx

from reroll.errors import UsageError
from reroll.rewrite.analysis.samples import random_inputs, token_input, vocabulary
from reroll.rewrite.ir.interpret import run
from reroll.rewrite.ir.program import Program, weight_nodes
from reroll.rewrite.ir.shapes import concrete
from reroll.rewrite.ir.weights import WeightTable

# length of the inputs on which positions are computed
LENGTH = 4
# a graph that reads more elements of weights computes no positions
MOST_ELEMENTS = 2**20


def position_limits(program: Program) -> dict[str, int]:
    """Return the maximum length of each input of tokens that a learned table bounds.

    The indices into a table of positions rise by one from token to token, whatever the tokens are.
    They need not start at 0.
    """
    limits: dict[str, int] = {}
    for node in program.graph.nodes:
        if node.target is not torch.ops.aten.embedding.default or node.args[0].op != "get_attr":
            continue
        rows = program.weights[str(node.args[0].target)].meta.shape[0]
        for first, length in _risings(program, node.args[1]):
            for name in _inputs_of_length(program, length):
                limits[name] = min(limits.get(name, rows), rows - first)
    return limits


def longest(program: Program) -> int | None:
    """Return the maximum length of a text by the Program's tables; None if they do not bound it."""
    item = token_input(program)
    return None if item is None else position_limits(program).get(item.name)


def check_length(program: Program, length: int, where: str, hint: str) -> None:
    """Raise UsageError if a text of `length` tokens is longer than the Program's tables allow."""
    limit = longest(program)
    if limit is not None and length > limit:
        raise UsageError(
            f"{length} tokens are more than the {limit} positions that the model has learned",
            where=where,
            hint=hint.format(limit=limit),
        )


def out_of_reach(
    program: Program, inputs: Mapping[str, Tensor | None], past: int = 0
) -> UsageError | None:
    """Explain why a lookup failed: an id outside of the vocabulary, or too many positions.

    Return None if neither is the case.
    """
    limits = position_limits(program)
    for item in program.inputs:
        ids = inputs.get(item.name)
        if item.role != "data" or ids is None or ids.is_floating_point() or ids.dim() != 2:
            continue
        length, limit = past + ids.shape[1], limits.get(item.name)
        if limit is not None and length > limit:
            return UsageError(
                f"{length} tokens are more than the {limit} positions that the model has learned",
                where=item.name,
                hint=f"give it at most {limit} tokens, including those to generate",
            )
        size = vocabulary(program, item.name)
        # after a device-side assertion, tensors on the device cannot be read
        bad = ids[(ids < 0) | (ids >= size)] if size is not None and ids.is_cpu else ids[:0]
        if bad.numel():
            return UsageError(
                f"there is no token {bad[0].item()} in a vocabulary of {size}",
                where=item.name,
                hint="use the model's own tokenizer",
            )
    return None


def _inputs_of_length(program: Program, length: int) -> list[str]:
    """Return the inputs of tokens that have this length where others have `LENGTH`."""
    sizes = {"b": 1, "s": LENGTH, "t": LENGTH, "e": LENGTH + 3}
    return [
        item.name
        for item in program.inputs
        if item.role == "data"
        and len(item.type.shape) == 2
        and isinstance(dim := item.type.shape[1], str)
        and dim in sizes
        and concrete(dim, sizes) == length
    ]


def _risings(program: Program, index: fx.Node) -> list[tuple[int, int]]:
    """Return (first, length) of a node's numbers if they rise by one from token to token.

    The result is empty if they do not, or has one entry.
    """
    part = _part(program, index)
    if part is None:
        return []
    top = vocabulary(program) or 2
    # of two tokens, at least one is not the padding token, after which positions may be counted
    for token in {top - 1, max(top - 2, 0)}:
        inputs = {
            name: torch.full_like(t, token) if not t.is_floating_point() else t
            for name, t in random_inputs(part, rows=1, length=LENGTH).items()
        }
        numbers = run(part, inputs)["index"].flatten()
        rising = torch.arange(len(numbers)) + numbers[0]
        if len(numbers) >= LENGTH and torch.equal(numbers, rising.to(numbers.dtype)):
            return [(int(numbers[0]), len(numbers))]
    return []


def _part(program: Program, index: fx.Node) -> Program | None:
    """Cut out the Program that computes the indices of a lookup; None if it reads large weights."""
    edited = program.edit()
    nodes = {node.name: node for node in edited.graph.nodes}
    edited.graph.output_node().args = ((nodes[index.name],),)
    edited.graph.eliminate_dead_code()
    used = {name: program.weights[name] for name in weight_nodes(edited.graph)}
    if edited.loops or sum(w.elements() for w in used.values()) > MOST_ELEMENTS:
        return None
    return replace(edited, outputs=("index",), weights=WeightTable(used))
