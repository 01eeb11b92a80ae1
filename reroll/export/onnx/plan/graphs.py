"""Plan ONNX graphs: go through the nodes as they will run, and note what they need."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from reroll.errors import ExportError
from reroll.export.onnx.plan.parts import computed_inputs
from reroll.export.onnx.plan.reading import Read, Ref, Slot, plan_read
from reroll.export.onnx.plan.segments import LoopPlan, Segment, Trips, plan_loop
from reroll.export.onnx.plan.settings import Settings, nodes_in
from reroll.export.onnx.plan.states import (
    Parts,
    Ring,
    State,
    by_layer,
    cache_parts,
    plan_rings,
    recent_parts,
    recurrence_parts,
    with_idle,
)
from reroll.export.onnx.plan.weights import Initializer, Layout
from reroll.rewrite.analysis.state_plan import plan_states
from reroll.rewrite.ir.defaults import reads
from reroll.rewrite.ir.matching import argument
from reroll.rewrite.ir.ops import ATTENTION, BIDIRECTIONAL, CACHE, RECURRENCE, is_stateful
from reroll.rewrite.ir.program import Program, ancestors
from reroll.rewrite.ir.visibility import Visibility


@dataclass(frozen=True)
class GraphPlan:
    """Plan of one ONNX graph.

    Attributes:
        nodes: the nodes of the Program's main graph that it runs, in order.
        loops: the loops among them, by node.
        reads: how each argument of a node reads a weight.
        states: its states, in the order of its inputs.
        numbers: the numbers of a node's states, trip by trip.
        rings: the caches that keep a window only, by number.
        thresholds: the default of the thresholds of exits; () if no token can leave.
    """

    nodes: tuple[fx.Node, ...]
    loops: Mapping[fx.Node, LoopPlan]
    reads: Mapping[tuple[fx.Node, Slot, Ref], Read]
    states: tuple[State, ...]
    numbers: Mapping[fx.Node, tuple[int, ...]]
    rings: Mapping[int, Ring]
    thresholds: tuple[float, ...]

    @property
    def initializers(self) -> tuple[Initializer, ...]:
        """The weights that it reads, each once."""
        every = (item for read in self.reads.values() for item in read.initializers)
        return tuple({item.name: item for item in every}.values())


def plan_graph(
    program: Program, settings: Settings, layout: Layout, *, is_rolled: bool
) -> GraphPlan:
    """Plan the graph of a whole Program; `is_rolled` says whether trips may become a Loop."""
    walk = Walk(program, settings, layout, is_rolled=is_rolled)
    for node, numbers in walk.numbers.items():
        # caches that grow come first
        growing = [n for n in numbers if n not in walk.rings]
        if node.target is CACHE:
            for number in growing:
                walk.add_states([number], cache_parts(node, None))
    walk.defaults(item.name for item in program.inputs)
    walk.nodes(program.graph.nodes, {})
    return walk.finish(program.graph.nodes)


class Walk:
    """Walk over the nodes of a graph in the order in which they will be written.

    A value is a Ref where a node is a weight, or None for any other.
    """

    def __init__(
        self, program: Program, settings: Settings, layout: Layout, *, is_rolled: bool
    ) -> None:
        self.program, self.settings, self.layout = program, settings, layout
        states = plan_states(program)
        self.numbers, self.rings = states.numbers, plan_rings(program, states)
        self.loops = {
            loop.node: plan_loop(program, loop, is_rolled=is_rolled) for loop in program.loops
        }
        self.reads: dict[tuple[fx.Node, Slot, Ref], Read] = {}
        self.states: dict[tuple[int, str], State] = {}
        self._known: set[str] = set()

    def finish(self, nodes: Iterable[fx.Node]) -> GraphPlan:
        """Return the plan of a graph that runs these nodes of the main graph."""
        nodes = tuple(nodes)
        loops = {node: self.loops[node] for node in nodes if node in self.loops}
        exits = [loop.exits.thresholds for loop in loops.values() if loop.exits is not None]
        return GraphPlan(
            nodes,
            MappingProxyType(loops),
            MappingProxyType(self.reads),
            with_idle(by_layer(self.states)),
            MappingProxyType(self.numbers),
            MappingProxyType(self.rings),
            exits[0] if exits else (),
        )

    def defaults(self, names: Iterable[str]) -> None:
        """Walk over what the graph computes for inputs of these names."""
        computed = computed_inputs(self.program)
        for name in names:
            item = next(i for i in self.program.inputs if i.name == name)
            if name in computed and item.default is not None and name not in self._known:
                self.defaults(reads(item))
                self.nodes(item.default.nodes, {})
            self._known.add(name)

    def nodes(
        self,
        nodes: Iterable[fx.Node],
        values: dict[fx.Node, Ref | None],
        trips: Trips | None = None,
    ) -> None:
        """Walk over some nodes of a graph, in these trips of a loop."""
        for node in nodes:
            if node.op == "get_attr":
                values[node] = Ref.of(node, trips)
                continue
            if node in self.loops:
                self._read(node, 1, values)
                plan = self.loops[node]
                for segment in plan.segments:
                    self.rounds(plan, segment, values)
                continue
            is_idle = _is_idle(node, trips)
            if is_stateful(node) and not is_idle:
                self._keep(node, trips)
            for slot in (*range(len(node.args)), *node.kwargs):
                turned = self._read(node, slot, values, is_idle=is_idle)
                if turned is not None:
                    values[node] = turned

    def _read(
        self,
        node: fx.Node,
        slot: Slot,
        values: Mapping[fx.Node, Ref | None],
        *,
        is_idle: bool = False,
    ) -> Ref | None:
        """Plan the weights in one argument; return what a node is that only turns one."""
        given = node.args[slot] if isinstance(slot, int) else node.kwargs[slot]
        turned = None
        for ref in filter(None, map(values.get, nodes_in(given))):
            read = Read("unread")
            if not is_idle:
                read = plan_read(self.program, self.settings, self.layout, node, slot, ref)
            self.reads[node, slot, ref] = read
            turned = ref.turned() if read.how == "turned" else None
        return turned

    def rounds(
        self,
        plan: LoopPlan,
        segment: Segment,
        values: Mapping[fx.Node, Ref | None],
        *,
        by_row: bool = False,
    ) -> None:
        """Walk over the trips of a segment, one round for all of them."""
        nodes = list(plan.loop.body.graph.nodes)
        if (kept := plan.kept) is not None and plan.skips(segment):
            nodes.sort(key=lambda n: n not in kept)
        places = plan.loop.places[len(plan.loop.carry) :]
        for position in range(segment.period):
            trips = Trips(plan, segment.trips(position), by_row)
            inner: dict[fx.Node, Ref | None] = {}
            for place, value in zip(places, plan.loop.inputs, strict=True):
                given = [value[n] for n in trips.numbers] if isinstance(value, tuple) else [value]
                refs = {values.get(v) if isinstance(v, fx.Node) else None for v in given}
                inner[place] = refs.pop() if len(refs) == 1 else None
            self.nodes(nodes, inner, trips)

    def _keep(self, node: fx.Node, trips: Trips | None) -> None:
        """Plan the states of a node."""
        numbers = self.numbers[node]
        if trips is not None:
            numbers = trips.states(numbers)
        if node.target is CACHE:
            self.add_states(numbers, cache_parts(node, self.rings.get(numbers[0])))
        elif node.target is not RECURRENCE:
            self.add_states(numbers, recent_parts(node))
        else:
            delay = argument(node, "delay")
            delay = delay if trips is None else trips.resolve(delay)
            self.add_states(numbers, recurrence_parts(node, delay), torch.float32)

    def add_states(
        self, numbers: Sequence[int], parts: Parts, dtype: torch.dtype | None = None
    ) -> None:
        """Add parts of some states that are not planned yet."""
        for part, dims in parts.items():
            for number in numbers:
                state = State(number, part, dims, dtype or self.settings.dtype)
                self.states.setdefault((number, part), state)


def _is_idle(node: fx.Node, trips: Trips | None) -> bool:
    """Whether a node returns zeros in these trips, and reads nothing."""

    def resolved(value: Any) -> Any:
        return value if trips is None else trips.resolve(value)

    if node.target in (RECURRENCE, BIDIRECTIONAL):
        return resolved(argument(node, "active")) is False
    return node.target is ATTENTION and Visibility.of(node).map(resolved).is_empty


# ---- the graphs for one round of trips, for a host that schedules: see `emit.step`


def plan_step(program: Program, settings: Settings, layout: Layout) -> dict[str, GraphPlan]:
    """Plan the graphs `embed`, `step` and `head`.

    Raises ExportError if the model is not one loop whose trips share blocks in one cycle.
    """
    walks = {
        name: Walk(program, settings, layout, is_rolled=True) for name in ("embed", "step", "head")
    }
    plan = _step_loop(program, walks["step"])
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


def _step_loop(program: Program, walk: Walk) -> LoopPlan:
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
