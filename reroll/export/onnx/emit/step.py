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

from reroll.export.onnx.emit.translate import Translator, run_trip
from reroll.export.onnx.graph import Graph, Value
from reroll.export.onnx.ops.arguments import Trip
from reroll.export.onnx.plan.graphs import GraphPlan
from reroll.export.onnx.plan.record import Plan

HIDDEN, DEPTH, AFTER = "hidden_states", "depth", "hidden_states_after"
INT = torch.int64


def step_graphs(plan: Plan) -> dict[str, Graph]:
    """Return the three graphs by name."""
    embed, step, head = (_Part(plan, plan.graphs[name]) for name in ("embed", "step", "head"))
    (loop,) = step.plan.loops.values()
    (segment,) = loop.segments
    source, shape = loop.loop.carry[0], loop.loop.carry[0].meta["type"].shape
    axes = plan.settings.axes(shape)

    values = embed.begin()
    embed.run_nodes("main", embed.plan.nodes, values)
    embed.graph.output(values[source], HIDDEN, axes)

    start = step.hidden(shape, HIDDEN)
    depth = step.graph.input(DEPTH, INT, ("batch_size",))
    values = step.begin()
    step.run_nodes("main", step.plan.nodes[:-1], values)
    given: Any = fx.node.map_arg(loop.loop.inputs, values.__getitem__)
    carry: tuple[Any, ...] = (start,)
    for position in range(segment.period):
        trip = Trip(loop, segment.trips(position), by_row=True, repeat=depth)
        carry = run_trip(step, trip, carry, tuple(given))
    step.graph.output(step.tensor(carry[0]), AFTER, axes)
    step.states.add_outputs(step)

    values = head.begin()
    values.update(dict.fromkeys(loop.loop.node.users, head.hidden(shape, HIDDEN)))
    results = head.run_nodes("main", head.plan.nodes, values)
    returned: Any = plan.program.graph.output_node().args[0]
    for name, node, value in zip(plan.program.outputs, returned, results, strict=True):
        head.output(name, value, node)
    return {"embed": embed.graph, "step": step.graph, "head": head.graph}


class _Part(Translator):
    """Translator of some nodes of the main graph."""

    def __init__(self, whole: Plan, plan: GraphPlan) -> None:
        super().__init__(whole, plan)
        self.graph.reserve([*self.program.outputs, AFTER])

    def begin(self) -> dict[fx.Node, Any]:
        """Add the inputs, and return the values of the Program's."""
        places = [n for n in self.plan.nodes if n.op == "placeholder"]
        values = {p: self.given(str(p.target)) for p in places}
        self.add_inputs()
        return values

    def hidden(self, shape: Any, name: str) -> Value:
        """Add the carried value as an input."""
        value = self.graph.input(name, self.settings.dtype, self.settings.axes(shape))
        for position, dim in enumerate(shape[:2]):
            if isinstance(dim, str):
                end = position + 1
                size = self.op("Shape", value, dtype=INT, start=position, end=end, hint=dim)
                self.sizes.setdefault(dim, size)
        return value
