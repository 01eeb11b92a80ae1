"""Compute logits from a loop's result: by the model's own norm and head, or by those of each exit.

A token's logits are computed with the weights of the exit at which it left. The operations between
the loop and the head's matrix are small: they run for all exits, and each token selects its own.
The matrix is one op that multiplies each token by the head of its exit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from reroll.errors import PassError
from reroll.rewrite.ir.builder import Builder
from reroll.rewrite.ir.hidden import mark, marks
from reroll.rewrite.ir.ops import EXIT_LINEAR
from reroll.rewrite.ir.program import Loop, Program, ancestors
from reroll.rewrite.ir.weights import Weight, copy

aten = torch.ops.aten
LINEAR = aten.linear.default

HINT = "criteria that need no logits: saturation, latent, linear, mlp, gated"


def path_to_logits(program: Program, loop: Loop, starts: list[fx.Node]) -> list[fx.Node]:
    """Return the nodes between a loop's result and the logits, in order.

    Raises PassError if the model has no logits, or if they also depend on an input or another loop.
    """
    if "logits" not in program.outputs:
        raise PassError("the model has no logits, which this criterion or head needs", hint=HINT)
    returned: Any = program.graph.output_node().args[0]
    needed = ancestors([returned[program.outputs.index("logits")]], stop=starts)
    later = [other for other in program.loops if other.node in needed]
    if any(other.node is not loop.node for other in later):
        raise PassError(f"another loop stands between {loop.name} and the logits", hint=HINT)
    beside = [n.name for n in needed if n.op == "placeholder"] + [n.node.name for n in later]
    if beside:
        raise PassError(f"the logits depend on {beside[0]}, beside the loop's result")
    return [n for n in program.graph.nodes if n in needed and n not in starts]


def copy_path(graph: fx.Graph, path: list[fx.Node], values: dict[fx.Node, fx.Node]) -> fx.Node:
    """Copy the path to the logits into another graph; `values` maps its inputs to nodes there."""
    for node in path:
        values[node] = graph.node_copy(node, lambda n: values[n])
    return values[path[-1]]


def add_heads(
    program: Program, loop: Loop, result: fx.Node, depth: fx.Node, at: list[int], whole: bool
) -> tuple[Program, int]:
    """Give each exit norms of its own, and with `whole` a head; edits in place.

    `depth` is the node with the number of trips of each token. New weights start as the model's
    own, and are named `exits.STOP.NAME`. Returns the Program and the number of new parameters.
    """
    path = path_to_logits(program, loop, [result])
    heads = [n for n in path if n.target is LINEAR and n.args[1].op == "get_attr"]  # type: ignore[union-attr]
    if not heads:
        raise PassError(
            "no linear layer computes the logits, so exits can have no head of their own"
        )
    head, before = heads[-1], path[: path.index(heads[-1])]
    head_weights: dict[str, Weight] = {}

    def weight_of(stop: int, node: fx.Node, called: str = "") -> fx.Node:
        name = f"exits.{stop}.{called or node.target}"
        old = program.weights[str(node.target)]
        head_weights[name] = Weight((copy(old.entries[0], stop),), trainable=old.trainable)
        new = program.graph.get_attr(name)
        new.meta.update(node.meta)
        return new

    with program.graph.inserting_before(head):
        chosen = _chosen(program.graph, before, head, result, depth, at, weight_of)
        head.update_arg(0, chosen)
        if whole:
            weights = [n for n in head.args[1:] if isinstance(n, fx.Node)]
            # a head that is tied to the embeddings has their name
            names = ("lm_head.weight", "lm_head.bias")
            nodes = [
                [node, *(weight_of(stop, node, name) for stop in at)]
                for node, name in zip(weights, names, strict=False)
            ]
            args = (chosen, depth, list(at), nodes[0], nodes[1] if nodes[1:] else [])
            new = Builder(program.graph).call(EXIT_LINEAR, *args)
            mark(new, marks(head))
    if whole:
        head.replace_all_uses_with(new)
    program.graph.eliminate_dead_code()
    added = sum(weight.elements() for weight in head_weights.values())
    return program.with_weights(program.weights.with_weights(head_weights)).pruned(), added


def _chosen(
    graph: fx.Graph,
    before: list[fx.Node],
    head: fx.Node,
    result: fx.Node,
    depth: fx.Node,
    at: list[int],
    weight_of: Callable[[int, fx.Node], fx.Node],
) -> fx.Node:
    """Build the head's input: each token's hidden state after the norms of its exit."""
    chosen: Any = head.args[0]
    if not any(node.op == "get_attr" for node in before):
        return chosen  # type: ignore[no-any-return]
    build = Builder(graph)
    for stop in at:
        values = {result: result}
        for node in before:
            is_weight = node.op == "get_attr"
            values[node] = (
                weight_of(stop, node) if is_weight else graph.node_copy(node, values.__getitem__)
            )
        here = build.call(aten.unsqueeze.default, build.call(aten.eq.Scalar, depth, stop), -1)
        old, other = chosen, values[head.args[0]]  # type: ignore[index]
        chosen = build.call(aten.where.self, here, other, old)
        mark(chosen, marks(old))
    return chosen  # type: ignore[no-any-return]
