"""The plan of an export: graphs with their loops, states and weights, and the weight file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from torch import fx

from reroll.export.onnx.plan.graphs import GraphPlan, plan_graph, plan_step
from reroll.export.onnx.plan.parts import computed_inputs
from reroll.export.onnx.plan.segments import LoopPlan
from reroll.export.onnx.plan.settings import Settings
from reroll.export.onnx.plan.weights import FILE, Layout, Region
from reroll.rewrite.ir.program import Program

# before the names of a draft's graphs, and of what the file has for it alone
DRAFT = "draft-"


@dataclass(frozen=True)
class Plan:
    """Everything that an export decides. Its text is a table.

    Attributes:
        graphs: the plan of each graph, by the name of its file.
        regions: the weights of the file, in order.
        size: bytes of the weight file.
        computed_inputs: the Program's inputs that graphs compute themselves.
        wide: floating-point nodes that are computed in fp32 whatever the precision.
        draft: the plan of the Program's draft, over the same file; None without one.
    """

    program: Program
    settings: Settings
    graphs: Mapping[str, GraphPlan]
    regions: tuple[Region, ...]
    size: int
    computed_inputs: tuple[str, ...]
    wide: frozenset[fx.Node]
    draft: Plan | None = None

    @property
    def plans(self) -> tuple[Plan, ...]:
        """This plan, and that of the draft."""
        return (self,) if self.draft is None else (self, self.draft)

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def make_plan(program: Program, settings: Settings, kinds: Iterable[str]) -> Plan:
    """Plan graphs of these kinds: "loop", "unrolled" or "step".

    A draft has graphs of the same kinds, but no "step", under names with `DRAFT` before them.
    Raises ExportError for "step" if the model is not one loop whose trips share blocks in a cycle.
    """
    kinds = tuple(dict.fromkeys(kinds))
    plan, layout = _plan(program, settings, kinds, Layout(program))
    if program.draft is None:
        return plan
    whole = [kind for kind in kinds if kind != "step"] or ["unrolled"]
    beside = Layout(program.draft, layout)
    draft, beside = _plan(program.draft, settings, whole, beside)
    named = MappingProxyType({f"{DRAFT}{name}": each for name, each in draft.graphs.items()})
    return replace(plan, size=beside.size, draft=replace(draft, graphs=named))


def _plan(
    program: Program, settings: Settings, kinds: Iterable[str], layout: Layout
) -> tuple[Plan, Layout]:
    graphs: dict[str, GraphPlan] = {}
    for kind in kinds:
        if kind == "step":
            graphs |= plan_step(program, settings, layout)
        else:
            graphs[kind] = plan_graph(program, settings, layout, is_rolled=kind == "loop")
    plan = Plan(
        program,
        settings,
        MappingProxyType(graphs),
        layout.regions,
        layout.size,
        computed_inputs(program),
        frozenset(settings.wide_nodes(program)),
    )
    return plan, layout


def _lines(plan: Plan) -> Iterator[str]:
    settings = plan.settings
    yield f"{settings.precision}, opset {settings.opset}, runtime {settings.runtime}"
    graphs = [pair for each in plan.plans for pair in each.graphs.items()]
    for name, graph in graphs:
        yield f"\n{name}.onnx"
        for loop in graph.loops.values():
            yield from _loop_lines(loop)
        for state in graph.states:
            yield f"  state {state.input}: {_type(state.dtype, state.shape)}"
        if graph.thresholds:
            yield f"  exits {list(graph.thresholds)}"
        for item in graph.initializers:
            where = "in the graph" if item.offset is None else f"at {item.offset:,}"
            yield f"  weight {item.name}: {_type(item.form.dtype, item.shape)} {where}"
    yield f"\n{FILE}, {plan.size:,} bytes"
    for each in plan.plans:
        for region in each.regions:
            kind = _type(region.form.dtype, (region.entries, *region.form.shape))
            yield f"  {region.offset:,} {stored_name(plan, each, region)}: {kind}"


def stored_name(plan: Plan, each: Plan, region: Region) -> str:
    """Return the name of a region of a plan, or of its draft's, in the whole file."""
    return region.name if each is plan else DRAFT + region.name


def _loop_lines(plan: LoopPlan) -> Iterator[str]:
    for segment in plan.segments:
        last = segment.start + segment.period * segment.rounds - 1
        how = f"a Loop of {segment.rounds} rounds" if segment.rounds > 1 else "written out"
        skipping = ", skipped once all tokens have left" if plan.skips(segment) else ""
        yield f"  {plan.loop.name}: trips {segment.start} to {last}, {how}{skipping}"


def _type(dtype: object, shape: Iterable[object]) -> str:
    return f"{str(dtype).removeprefix('torch.')} [{', '.join(map(str, shape))}]"
