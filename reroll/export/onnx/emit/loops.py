"""Emit depth loops: trips one after the other, or an ONNX Loop over rounds of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from onnx import helper

from reroll.export.onnx.graph import Graph, Value
from reroll.export.onnx.ops.arguments import Trip, Varying
from reroll.export.onnx.ops.exits import run_skipping
from reroll.export.onnx.plan.segments import LoopPlan, Segment

if TYPE_CHECKING:
    from reroll.export.onnx.emit.translate import Translator

BOOL, INT = torch.bool, torch.int64


def emit_loop(
    g: Translator, plan: LoopPlan, carry: tuple[Any, ...], inputs: tuple[Any, ...]
) -> tuple[Any, ...]:
    """Emit all trips of a depth loop, and return its last carry."""
    carry = tuple(g.tensor(value) for value in carry)
    for segment in plan.segments:
        if segment.rounds == 1:
            for position in range(segment.period):
                carry = run_trip(g, Trip(plan, segment.trips(position)), carry, inputs)
        else:
            carry = _loop(g, plan, segment, carry, inputs)
    return carry


def run_trip(
    g: Translator,
    trip: Trip,
    carry: tuple[Any, ...],
    inputs: tuple[Any, ...],
    *,
    is_skipped: bool = False,
) -> tuple[Any, ...]:
    """Emit one trip, or the running one of several, and return the carry after it.

    If it is skipped, it runs its kept nodes only once all tokens have left.
    """
    loop = trip.loop.loop
    given = [_input(g, value, trip) for value in inputs]
    before, g.trip = g.trip, trip
    name = f"{loop.name} {trip.numbers[0]}"
    try:
        if is_skipped:
            return run_skipping(g, trip.loop, name, carry, given)
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
    plan: LoopPlan,
    segment: Segment,
    carry: tuple[Value, ...],
    inputs: tuple[Any, ...],
) -> tuple[Value, ...]:
    loop, skips = plan.loop, plan.skips(segment)
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
        trip = Trip(plan, segment.trips(position), repeat=number)
        values = run_trip(g, trip, values, inputs, is_skipped=skips)
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
