"""Lower exits: tokens that have left keep their hidden state, and unneeded trips are skipped.

The thresholds are an input with a default, one for each trip. In a Loop, a trip whose tokens have
all left computes only keys and values for its caches: an `If` in the body. Where trips are
unrolled, none is skipped, and the results are the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from onnx import helper
from torch import fx

from reroll.export.onnx.graph import TARGET, Graph, Value
from reroll.export.onnx.plan.segments import LoopPlan
from reroll.rewrite.ir.exits import is_open
from reroll.rewrite.ir.lowerings import find_lowering, lowering
from reroll.rewrite.ir.ops import ABSENT

if TYPE_CHECKING:
    from reroll.export.onnx.emit.translate import Translator

BOOL, INT, FLOAT = torch.bool, torch.int64, torch.float32


@lowering(TARGET, "reroll::exit.default")
def exit_(g: Translator, node: fx.Node, done: Any, score: Any, threshold: Any) -> Value:
    """Return which tokens have left, including those whose score is above the threshold."""
    bound = _threshold(g)
    if bound is None:
        return g.tensor(done, BOOL)
    above = g.op("Greater", g.tensor(score, FLOAT), bound, dtype=BOOL)
    return g.op("Or", g.tensor(done, BOOL), above)


@lowering(TARGET, "reroll::hold.default")
def hold(g: Translator, node: fx.Node, done: Any, old: Any, new: Any) -> Value:
    """Select the old hidden state where a token has left."""
    dtype = g.dtype(node)
    is_done = g.op("Unsqueeze", g.tensor(done, BOOL), g.ints(2))
    return g.op("Where", is_done, g.tensor(old, dtype), g.tensor(new, dtype), dtype=dtype)


@lowering(TARGET, "reroll::streak.default")
def streak(
    g: Translator, node: fx.Node, token: Any, last: Any, count: Any, threshold: Any
) -> tuple[Value, Value]:
    """Return the last predicted token, and how often in a row it was predicted before this trip."""
    last, count = g.tensor(last, INT), g.tensor(count, INT)
    if _threshold(g) is None:
        return last, count
    token = g.tensor(token, INT)
    more = g.op("Add", count, g.number(1, INT))
    same = g.op("Equal", token, last, dtype=BOOL)
    return token, g.op("Where", same, more, g.number(0, INT), dtype=INT)


@lowering(TARGET, "reroll::mark_keys.default")
def mark_keys(g: Translator, node: fx.Node, k: Any, absent: Any) -> Value:
    """Extend keys by a channel that marks absent tokens."""
    dtype = g.dtype(node)
    k = g.tensor(k, dtype)
    mark = g.op("Mul", g.cast(g.tensor(absent, BOOL), dtype), g.number(ABSENT, dtype))
    mark = g.op("Unsqueeze", mark, g.ints(1, 3))
    sizes = g.op("Concat", g.op("Shape", k, start=0, end=3, dtype=INT), g.ints(1), axis=0)
    return g.op("Concat", k, g.op("Expand", mark, sizes), axis=-1)


@lowering(TARGET, "reroll::exit_linear.default")
def exit_linear(
    g: Translator, node: fx.Node, x: Any, depth: Any, stops: Any, weights: Any, biases: Any
) -> Value:
    """Multiply by the matrix of the exit at which a token left; all products are computed."""
    linear = find_lowering(TARGET, "aten::linear.default")
    assert linear is not None
    depth = g.tensor(depth, INT)
    heads: list[Value] = [
        linear(g, node, x, weight, biases[number] if biases else None)
        for number, weight in enumerate(weights)
    ]
    out = heads[0]
    for stop, own in zip(stops, heads[1:], strict=True):
        here = g.op("Equal", depth, g.number(stop, INT), dtype=BOOL)
        out = g.op("Where", g.op("Unsqueeze", here, g.ints(2)), own, out, dtype=own.dtype)
    return out


def _threshold(g: Translator) -> Value | None:
    """Return the threshold of the running trip; None where no token can leave."""
    assert g.trip is not None
    exits, numbers = g.trip.loop.exits, g.trip.numbers
    if exits is None or not is_open(exits.thresholds[numbers[0]]):
        return None
    place = g.number(numbers[0], INT)
    if g.trip.repeat is not None:
        place = g.op("Gather", g.number([*numbers], INT), g.trip.repeat, axis=0)
    return g.op("Gather", g.thresholds, place, axis=0)


def run_skipping(
    g: Translator, plan: LoopPlan, name: str, carry: tuple[Any, ...], given: list[Any]
) -> tuple[Any, ...]:
    """Emit a trip's cache updates, and an `If` for the rest of the trip.

    The rest runs unless all tokens have left.
    """
    graph, exits, kept = plan.loop.body.graph, plan.exits, plan.kept
    assert exits is not None
    assert kept is not None
    values = g.start(graph, [*carry, *given])
    g.run_nodes(name, [n for n in graph.nodes if n in kept], values)
    body = g.graph
    done = g.op("Cast", g.tensor(carry[exits.left_position]), to=7, dtype=INT)
    all_done = g.op("Greater", g.op("ReduceMin", done, keepdims=0), g.number(0, INT), dtype=BOOL)
    branches = []
    kinds = [g.tensor(value).dtype for value in carry]
    for skips in (True, False):
        branch = g.graph = Graph(body, is_branch=True)
        if skips:
            results: Any = carry
        else:
            rest = [n for n in graph.nodes if n not in kept]
            results = g.run_nodes(name, rest, dict(values))
        for value, kind in zip(results, kinds, strict=True):
            branch.output(g.tensor(value, kind), body.fresh("branch"), None)
        branches.append(branch)
        g.graph = body
    outputs = [Value(body.fresh("after"), kind, body) for kind in kinds]
    body.nodes.append(
        helper.make_node(
            "If",
            [all_done.name],
            [value.name for value in outputs],
            name=body.fresh("skip"),
            then_branch=branches[0].finish("skipped"),
            else_branch=branches[1].finish("run"),
        )
    )
    return tuple(outputs)
