"""Graphs for one round of trips, for a host that schedules: each row has a depth of its own.

The model becomes three graphs. `embed.onnx` computes the hidden states of tokens, `step.onnx` runs
one round on them, and `head.onnx` computes the outputs. In `step.onnx`, `depth` [batch] is the
round of each row. Low-rank residuals and norms are gathered by it, and the states of a row are
those of its round. State N of the graph is state `N + depth * states` of the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from reroll.errors import ExportError
from reroll.export.onnx.emit.loops import run_trip
from reroll.export.onnx.emit.translate import Translator
from reroll.export.onnx.graph import Graph, Value
from reroll.export.onnx.plan.parameters import Settings, Trip, nodes_in
from reroll.export.onnx.plan.segments import Segment, rolled
from reroll.export.onnx.plan.weights import WeightFile
from reroll.rewrite.ir.program import Loop, Program, ancestors

HIDDEN, DEPTH, AFTER = "hidden_states", "depth", "hidden_states_after"
INT = torch.int64


def step_graphs(program: Program, weights: WeightFile, settings: Settings) -> dict[str, Graph]:
    """Return the three graphs by name.

    Raises ExportError if the model is not one loop whose trips share blocks in one cycle.
    """
    loop, segment = _segment(program)
    inputs = {n for n in program.graph.nodes if n.op == "placeholder"}
    before = ancestors(loop.carry, inputs)
    around = ancestors(nodes_in(loop.inputs), inputs)
    results = set(loop.node.users)
    end = program.graph.output_node()
    after = ancestors(end.all_input_nodes, results | inputs)
    if loop.node in after or loop.node in around:
        raise ExportError("the outputs depend on more than the loop's result")
    hidden = loop.carry[0].meta["type"]

    embed = _Part(program, weights, settings)
    values = embed.begin(_used(before, inputs))
    embed.run_nodes("main", _ordered(program, before), values)
    embed.graph.output(values[loop.carry[0]], HIDDEN, settings.axes(hidden.shape))

    step = _Part(program, weights, settings)
    start = step.hidden(hidden.shape, HIDDEN)
    depth = step.graph.input(DEPTH, INT, ("batch_size",))
    values = step.begin(_used(around, inputs))
    step.run_nodes("main", _ordered(program, around), values)
    given: Any = fx.node.map_arg(loop.inputs, values.__getitem__)
    carry: tuple[Any, ...] = (start,)
    for position in range(segment.period):
        trip = Trip(segment.trips(position), depth, rows=True)
        carry = run_trip(step, loop, trip, carry, tuple(given))
    step.graph.output(step.tensor(carry[0]), AFTER, settings.axes(hidden.shape))
    step.states.add_outputs(step)

    head = _Part(program, weights, settings)
    values = head.begin(_used(after, inputs))
    start = head.hidden(hidden.shape, HIDDEN)
    values.update(dict.fromkeys(results, start))
    head.run_nodes("main", _ordered(program, after), values)
    returned: Any = end.args[0]
    for name, node in zip(program.outputs, returned, strict=True):
        head.output(name, values[node], node)
    return {"embed": embed.graph, "step": step.graph, "head": head.graph}


class _Part(Translator):
    """Translator of some nodes of the main graph."""

    def __init__(self, program: Program, weights: WeightFile, settings: Settings) -> None:
        super().__init__(program, weights, settings, rolled=True)
        self.graph.reserve([*program.outputs, AFTER])

    def begin(self, places: list[fx.Node]) -> dict[fx.Node, Any]:
        """Return the values of the Program's inputs at these placeholders."""
        return {p: self.given(str(p.target)) for p in places}

    def hidden(self, shape: Any, name: str) -> Value:
        """Add the carried value as an input."""
        value = self.graph.input(name, self.settings.dtype, self.settings.axes(shape))
        for position, dim in enumerate(shape[:2]):
            if isinstance(dim, str):
                end = position + 1
                size = self.op("Shape", value, dtype=INT, start=position, end=end, hint=dim)
                self.sizes.setdefault(dim, size)
        return value


def _segment(program: Program) -> tuple[Loop, Segment]:
    if len(program.loops) != 1 or len(program.loops[0].carry) != 1:
        raise ExportError("the step graph is for models of one loop that carries one value")
    (loop,) = program.loops
    segments = rolled(program, loop)
    if len(segments) != 1:
        raise ExportError(
            f"the trips of {loop.name} are not rounds of one cycle",
            hint="the step graph is for tied models: tie(blocks=N, layout=cycle), N dividing the "
            "trips",
        )
    return loop, segments[0]


def _used(nodes: set[fx.Node], inputs: set[fx.Node]) -> list[fx.Node]:
    return sorted(nodes & inputs)


def _ordered(program: Program, nodes: set[fx.Node]) -> list[fx.Node]:
    loops = {loop.node for loop in program.loops}
    results = {user for node in loops for user in node.users}
    return [n for n in program.graph.nodes if n in nodes and n not in results and n not in loops]
