"""Emit depth loops: trips one after the other, or an ONNX Loop over rounds of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from onnx import helper

from reroll.export.onnx.graph import Graph, Value
from reroll.export.onnx.plan.parameters import Trip, Varying
from reroll.export.onnx.plan.segments import Segment, rolled, unrolled
from reroll.rewrite.ir.program import Loop

if TYPE_CHECKING:
    from reroll.export.onnx.emit.translate import Translator

BOOL, INT = torch.bool, torch.int64


def emit_loop(
    g: Translator, loop: Loop, carry: tuple[Any, ...], inputs: tuple[Any, ...]
) -> tuple[Any, ...]:
    """Emit all trips of a depth loop, and return its last carry."""
    carry = tuple(g.tensor(value) for value in carry)
    for segment in rolled(g.program, loop) if g.rolled else unrolled(loop):
        if segment.rounds == 1:
            for position in range(segment.period):
                carry = run_trip(g, loop, Trip(segment.trips(position)), carry, inputs)
        else:
            carry = _loop(g, loop, segment, carry, inputs)
    return carry


def run_trip(
    g: Translator, loop: Loop, trip: Trip, carry: tuple[Any, ...], inputs: tuple[Any, ...]
) -> tuple[Any, ...]:
    """Emit one trip, or the running one of several, and return the carry after it."""
    # imported late: the lowerings of ops build on the translator, which builds on this module
    from reroll.export.onnx.ops import exits

    given = [_input(g, value, trip) for value in inputs]
    before, g.trip = g.trip, trip
    name = f"{loop.name} {trip.numbers[0]}"
    try:
        if exits.can_skip(g, loop, trip):
            return exits.run_skipping(g, loop, name, carry, given)
        return g.walk(name, loop.body.graph, [*carry, *given])
    finally:
        g.trip = before


def _input(g: Translator, value: Any, trip: Trip) -> Any:
    """Return a body's input in the given trips."""
    if not isinstance(value, tuple):
        return value
    values = tuple(value[number] for number in trip.numbers)
    return values[0] if len(set(values)) == 1 else Varying(g, values, trip)


def _loop(
    g: Translator,
    loop: Loop,
    segment: Segment,
    carry: tuple[Value, ...],
    inputs: tuple[Any, ...],
) -> tuple[Value, ...]:
    outer, scans = g.graph, g.scans
    body = g.graph = Graph(outer)
    g.scans = []
    name = outer.fresh(loop.name)
    number = body.input(outer.fresh("round"), INT, ())
    condition = body.input(outer.fresh("condition"), BOOL, ())
    places = loop.places
    shapes = [g.settings.axes(place.meta["type"].shape) for place in places[: len(carry)]]
    values: tuple[Any, ...] = tuple(
        body.input(outer.fresh("carry"), value.dtype, shape)
        for value, shape in zip(carry, shapes, strict=True)
    )
    for position in range(segment.period):
        trip = Trip(segment.trips(position), number)
        values = run_trip(g, loop, trip, values, inputs)
    body.output(condition, outer.fresh("go_on"), ())
    for value, before, shape in zip(values, carry, shapes, strict=True):
        body.output(g.cast(g.tensor(value), before.dtype), outer.fresh("carried"), shape)
    for scan in g.scans:
        body.output(scan.value, outer.fresh("scanned"), None)
    found, g.scans = g.scans, scans
    g.graph = outer
    results = [Value(outer.fresh(f"{name}.out"), v.dtype, outer) for v in carry]
    stacks = [Value(outer.fresh(f"{name}.stack"), s.value.dtype, outer) for s in found]
    outer.nodes.append(
        helper.make_node(
            "Loop",
            [
                g.number(segment.rounds, INT).name,
                g.number(True, BOOL).name,
                *(v.name for v in carry),
            ],
            [v.name for v in (*results, *stacks)],
            name=name,
            body=body.finish(f"{name}.body"),
        )
    )
    for scan, stack in zip(found, stacks, strict=True):
        scan.take(stack)
    return tuple(results)
