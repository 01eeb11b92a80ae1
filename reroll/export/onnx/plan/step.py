"""Plan the graphs for one round of trips, for a host that schedules: see `emit.step`."""

from __future__ import annotations

from torch import fx

from reroll.errors import ExportError
from reroll.export.onnx.plan.graphs import GraphPlan, Walk
from reroll.export.onnx.plan.reading import Ref
from reroll.export.onnx.plan.segments import LoopPlan
from reroll.export.onnx.plan.settings import Settings, nodes_in
from reroll.export.onnx.plan.weights import Layout
from reroll.rewrite.ir.program import Program, ancestors


def plan_step(program: Program, settings: Settings, layout: Layout) -> dict[str, GraphPlan]:
    """Plan the graphs `embed`, `step` and `head`.

    Raises ExportError if the model is not one loop whose trips share blocks in one cycle.
    """
    walks = {
        name: Walk(program, settings, layout, is_rolled=True) for name in ("embed", "step", "head")
    }
    plan = _loop(program, walks["step"])
    loop, graph = plan.loop, program.graph
    inputs = {n for n in graph.nodes if n.op == "placeholder"}
    results = set(loop.node.users)
    around = ancestors(nodes_in(loop.inputs), inputs)
    after = ancestors(graph.output_node().all_input_nodes, results | inputs)
    if loop.node in after or loop.node in around:
        raise ExportError("the outputs depend on more than the loop's result")
    parts = {
        "embed": ancestors(loop.carry, inputs),
        "step": around,
        "head": {*after, graph.output_node()} - results,
    }
    found = {}
    for name, walk in walks.items():
        nodes = [n for n in graph.nodes if n in parts[name]]
        walk.defaults(str(n.target) for n in nodes if n in inputs)
        values: dict[fx.Node, Ref | None] = {}
        walk.nodes(nodes, values)
        if name == "step":
            walk.rounds(plan, plan.segments[0], values, by_row=True)
            nodes.append(loop.node)
        elif walk.states:
            raise ExportError(
                "a layer outside of the loop keeps a state, and the step graphs have those of the "
                "loop only",
                hint="export this model with --graphs loop,unrolled",
            )
        found[name] = walk.finish(nodes)
    return found


def _loop(program: Program, walk: Walk) -> LoopPlan:
    if len(program.loops) != 1 or len(program.loops[0].carry) != 1:
        raise ExportError("the step graph is for models of one loop that carries one value")
    (plan,) = walk.loops.values()
    if len(plan.segments) != 1:
        raise ExportError(
            f"the trips of {plan.loop.name} are not rounds of one cycle",
            hint="the step graph is for tied models: tie(blocks=N, layout=cycle), N dividing the "
            "trips",
        )
    return plan
