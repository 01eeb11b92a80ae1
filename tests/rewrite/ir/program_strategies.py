"""Random Programs for hypothesis: graphs with loops, per-trip inputs, arguments of every kind."""

from __future__ import annotations

import operator
from typing import Any

import torch
from hypothesis import strategies as st
from torch import fx

from reroll.rewrite.checkpoint import MemorySource
from reroll.rewrite.ir import ops
from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.records import Body, Input, Origin, Step, TensorType
from reroll.rewrite.ir.weights import Weight, WeightTable
from reroll.rewrite.ir.weights.expressions import Meta, Source
from tests.programs import F32, aten, call, reroll, typed

NAMES = st.sampled_from(["x", "layers", "a.b", "0", "1e5", "5-3", "*", 'quo"te', "é", "if", "%x"])
DTYPES = st.sampled_from([F32, torch.bfloat16, torch.bool, torch.complex64, torch.float8_e4m3fn])
FLOATS = st.floats() | st.sampled_from([0.0, -0.0, 1e-05, 5e-324, 1.7976931348623157e308])
INTS = st.integers(-(2**63) + 1, 2**63 - 1)
CONSTANTS = st.one_of(
    st.none(),
    st.booleans(),
    INTS,
    FLOATS,
    st.text(),
    st.sampled_from(['"', "\\", "\n} ", "%x", "@w", "none", "\u2028", "\ud800"]),
    DTYPES,
    st.sampled_from([torch.strided, torch.contiguous_format, torch.channels_last]),
    st.sampled_from([torch.device("cpu"), torch.device("cuda", 1)]),
)
VALUES = st.recursive(
    CONSTANTS, lambda v: st.lists(v, max_size=3) | st.lists(v, max_size=3).map(tuple), max_leaves=8
)
DIMS = st.lists(st.integers(0, 9) | st.sampled_from(["b", "s", "s + 1", "Max(1, s)"]), max_size=3)
TYPES = st.builds(lambda dtype, dims: TensorType(dtype, tuple(dims)), DTYPES, DIMS)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """A well-formed Program; it need not compute anything sensible."""
    weights: dict[str, Weight] = {}
    bodies: dict[str, Body] = {}
    graph = fx.Graph()
    names = draw(st.lists(NAMES, unique=True, min_size=1, max_size=3))
    inputs = tuple(Input(name, draw(TYPES), "data") for name in names)
    pool = []
    for item in inputs:
        pool.append(graph.placeholder(item.name))
        pool[-1].meta["type"] = item.type
    fill(draw, graph, pool, weights)
    for number in range(draw(st.integers(0, 2))):
        insert_loop(draw, graph, pool, weights, bodies, number)
        fill(draw, graph, pool, weights)
    outputs = draw(st.lists(NAMES, unique=True, max_size=2))
    graph.output(tuple(draw(st.sampled_from(pool)) for _ in outputs))
    step = Step("p(x=1)", draw(st.floats(0, 9)), ("did\nit",), {"kl": draw(st.floats())})
    return Program(
        graph=graph,
        bodies=bodies,
        weights=WeightTable(weights),
        source=MemorySource({}),
        inputs=inputs,
        outputs=tuple(outputs),
        dtype=draw(DTYPES),
        origin=Origin(draw(st.text()), None, config={"}": [1, {"a": None}]}, steps=(step,)),
    )


def fill(
    draw: st.DrawFn,
    graph: fx.Graph,
    pool: list[fx.Node],
    weights: dict[str, Weight],
    trips: int | None = None,
    scope: str = "w",
) -> None:
    """Append random nodes; each joins the pool that the next ones draw from."""
    for _ in range(draw(st.integers(0, 5))):
        x, y = draw(st.sampled_from(pool)), draw(st.sampled_from(pool))
        kind = draw(st.integers(0, 7))
        if kind == 0:
            new = call(graph, aten.add.Tensor, x, draw(FLOATS), alpha=draw(INTS))
        elif kind == 1:
            new = call(graph, aten.index.Tensor, x, [None, y, draw(st.sampled_from([None, y]))])
        elif kind == 2:
            new = call(graph, aten.full.default, [draw(INTS), y], draw(INTS), dtype=draw(DTYPES))
        elif kind == 3:
            new = call(graph, reroll.glu.default, x, y, draw(st.text()))
        elif kind == 4:
            new = call(graph, operator.mul, x, draw(INTS))
        elif kind == 5:
            new = call(graph, aten.view.default, x, draw(st.lists(INTS, max_size=3)))
        elif kind == 6:
            new = call(graph, torch.sym_max, x, draw(INTS))
        else:
            new = call(graph, aten.linear.default, x, weight(draw, graph, weights, trips, scope))
        if draw(st.booleans()):
            new.meta["type"] = draw(TYPES)
        pool.append(new)


def weight(
    draw: st.DrawFn, graph: fx.Graph, weights: dict[str, Weight], trips: int | None, scope: str
) -> fx.Node:
    """A node that reads a new weight, or another node that reads one of this graph."""
    name = f"{scope}{draw(NAMES).replace('*', '')}" + ("" if trips is None else ".*")
    shape = (2, 3)
    if name not in weights:
        index = None if trips is None else tuple(i // 2 for i in range(trips))
        count = 1 if index is None else index[-1] + 1
        entries = tuple(Source(f"{name}/{i}", Meta(shape, F32)) for i in range(count))
        weights[name] = Weight(entries, index, draw(st.booleans()))
    node = graph.get_attr(name)
    return typed(node, *shape) if draw(st.booleans()) else node


def insert_loop(
    draw: st.DrawFn,
    graph: fx.Graph,
    pool: list[fx.Node],
    weights: dict[str, Weight],
    bodies: dict[str, Body],
    number: int,
) -> None:
    """Append a loop over a new body, and a node for each of its results."""
    trips, carried, extra = (draw(st.integers(1, 3)) for _ in range(3))
    carry = tuple(draw(st.sampled_from(pool)) for _ in range(carried))
    one = VALUES | st.sampled_from(pool)
    per_trip = st.lists(one, min_size=trips, max_size=trips).map(tuple)
    invariant = VALUES.filter(lambda value: not isinstance(value, tuple))
    inputs = tuple(
        draw(st.one_of(st.sampled_from(pool), per_trip, invariant)) for _ in range(extra)
    )
    body = fx.Graph()
    inside = [body.placeholder(f"p{i}") for i in range(carried + extra)]
    for place, value in zip(inside[carried:], inputs, strict=True):
        # what a constant is, is not checked against the type of the place that takes it
        if not isinstance(value, fx.Node | tuple) and draw(st.booleans()):
            place.meta["type"] = draw(TYPES)
    fill(draw, body, inside, weights, trips, f"loop{number}")
    body.output(tuple(draw(st.sampled_from(inside)) for _ in range(carried)))
    name = f"{draw(NAMES)}{number}"
    bodies[name] = Body(body, draw(st.integers(1, 6)))
    loop: Any = call(graph, ops.loop, name, carry, inputs, trips)
    pool.extend(call(graph, operator.getitem, loop, i) for i in range(carried))
