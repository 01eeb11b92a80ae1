"""Translate a Program's graphs to ONNX nodes, with the helpers that lowerings use.

A lowering is a function (g, node, *args, **kwargs) with the arguments of the op. Tensors are
`Value`s. Weights are `Parameter`s, each with its planned form. Sizes known only at run time
are `Size`s, and values that differ by trip are `Varying`. It returns the results of the op.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from onnx import helper
from torch import fx

from reroll.errors import ExportError, RerollError, located
from reroll.export.onnx.graph import ELEMENT, TARGET, Graph, Value
from reroll.export.onnx.ops.arguments import Parameter, Size, Trip, Varying, repeated
from reroll.export.onnx.ops.exits import run_skipping
from reroll.export.onnx.ops.states import States
from reroll.export.onnx.plan.graphs import GraphPlan
from reroll.export.onnx.plan.reading import Ref, Slot
from reroll.export.onnx.plan.record import Plan
from reroll.export.onnx.plan.segments import LoopPlan, Segment
from reroll.rewrite.ir import ops
from reroll.rewrite.ir.defaults import reads
from reroll.rewrite.ir.lowerings import find_lowering, op_name
from reroll.rewrite.ir.records import Dim, Input, TensorType

BOOL, INT = torch.bool, torch.int64
THRESHOLDS = "exit_thresholds"

_ARITHMETIC: dict[type[ast.AST], str] = {
    ast.Add: "Add",
    ast.Sub: "Sub",
    ast.Mult: "Mul",
    ast.FloorDiv: "Div",
}
_FUNCTIONS = {"FloorDiv": "Div", "Max": "Max", "Min": "Min"}


class Translator:
    """Translator of a Program to one ONNX graph, which follows the plan of that graph."""

    def __init__(self, whole: Plan, plan: GraphPlan) -> None:
        self.program, self.settings, self.wide = whole.program, whole.settings, whole.wide
        self.computed_inputs = whole.computed_inputs
        self.plan = plan
        self.graph = Graph()
        self.trip: Trip | None = None
        self.scans: list[Any] = []
        self.sizes: dict[str, Value] = {}
        self.states = States(plan)
        self.thresholds: Value | None = None
        self._given: dict[str, Value] = {}

    # ---- translation of graphs

    def run(self) -> Graph:
        """Translate the whole Program."""
        self.graph.reserve(self.program.outputs)
        inputs = [self.given(item.name) for item in self.program.inputs]
        self.add_inputs()
        results = self.walk("main", self.program.graph, inputs)
        for name, node, value in zip(
            self.program.outputs, _returned(self.program.graph), results, strict=True
        ):
            self.output(name, value, node)
        self.states.add_outputs(self)
        return self.graph

    def add_inputs(self) -> None:
        """Add the inputs that the Program does not have: states, and thresholds of exits."""
        self.states.add_inputs(self)
        if self.plan.thresholds:
            default = torch.tensor(self.plan.thresholds)
            self.thresholds = self.graph.default_input(THRESHOLDS, default)

    def output(self, name: str, value: Any, node: Any) -> None:
        """Make a value an output of the graph; floats are converted to fp32."""
        made = self.tensor(value)
        if made.dtype.is_floating_point:
            made = self.cast(made, torch.float32)
        shape = node.meta["type"].shape if isinstance(node, fx.Node) else ()
        self.graph.root.output(made, name, self.settings.axes(shape))

    def given(self, name: str) -> Value:
        """Return an input of the Program by name: a graph input, or its computed default."""
        if name not in self._given:
            item = next(i for i in self.program.inputs if i.name == name)
            computed = name in self.computed_inputs
            self._given[name] = self._stand_in(item) if computed else self._input(name, item.type)
        return self._given[name]

    def _stand_in(self, item: Input) -> Value:
        """Compute the default of an input that the graph does not take."""
        shape = item.type.shape
        if item.default is not None:
            arguments = [self.given(name) for name in reads(item)]
            value = self.tensor(self.walk(f"default {item.name}", item.default, arguments)[0])
        elif item.counts:
            length = self.tensor(self.size(shape[-1]))
            value = self.op("Range", self.number(0, INT), length, self.number(1, INT))
        else:
            value = self.number(0, INT)
        return self.op("Expand", self.cast(value, item.type.dtype), self.shape(shape))

    def _input(self, name: str, kind: TensorType) -> Value:
        dtype = kind.dtype
        if dtype.is_floating_point:
            dtype = torch.float32
        value = self.graph.input(name, dtype, self.settings.axes(kind.shape))
        for position, dim in enumerate(kind.shape):
            if isinstance(dim, str) and dim.isidentifier() and dim not in self.sizes:
                self.sizes[dim] = self.op(
                    "Shape", value, dtype=INT, start=position, end=position + 1, hint=dim
                )
        return value if dtype == kind.dtype else self.cast(value, self.real(kind.dtype))

    def walk(self, name: str, graph: fx.Graph, arguments: Sequence[Any]) -> tuple[Any, ...]:
        """Translate a graph for these arguments, and return its results."""
        return self.run_nodes(name, list(graph.nodes), self.start(graph, arguments))

    def start(self, graph: fx.Graph, arguments: Sequence[Any]) -> dict[fx.Node, Any]:
        """Return the values of a graph's placeholders."""
        places = [n for n in graph.nodes if n.op == "placeholder"]
        return dict(zip(places, arguments, strict=True))

    def run_nodes(
        self, name: str, nodes: Sequence[fx.Node], values: dict[fx.Node, Any]
    ) -> tuple[Any, ...]:
        """Translate some nodes of a graph in order into `values`.

        Returns the values of the output node; () if it is not among them.
        """
        for node in nodes:
            if node.op == "placeholder":
                continue
            if node.op == "get_attr":
                values[node] = Ref.of(node, self.trip)
            elif node.op == "output":
                result: Any = self._argument(node, 0, values)
                return tuple(result) if isinstance(result, tuple | list) else (result,)
            else:
                try:
                    values[node] = self._call(node, values)
                except RerollError:
                    with located(f"{name}, {node.name}{self._origin(node)}"):
                        raise
        return ()

    def _origin(self, node: fx.Node) -> str:
        """Name the module of the original near a node: that of the nearest weight before it."""
        front, seen = [node], {node}
        while front and node not in self.plan.loops:
            for each in front:
                if each.op == "get_attr":
                    return f" (after {str(each.target).rpartition('.')[0]})"
            front = [n for n in dict.fromkeys(_inputs(front)) if n not in seen]
            seen.update(front)
        return ""

    def _argument(self, node: fx.Node, slot: Slot, values: Mapping[fx.Node, Any]) -> Any:
        """Return one argument of a node, with its weights as the plan lets it read them."""

        def found(source: fx.Node) -> Any:
            value = values[source]
            if not isinstance(value, Ref):
                return value
            return Parameter(self, value, self.plan.reads[node, slot, value])

        given: Any = node.args[slot] if isinstance(slot, int) else node.kwargs[slot]
        return fx.node.map_arg(given, found)

    def _call(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        if node.target is ops.loop:
            inputs: Any = fx.node.map_arg(node.args[2], values.__getitem__)
            return emit_loop(self, self.plan.loops[node], self._argument(node, 1, values), inputs)
        args = [self._argument(node, slot, values) for slot in range(len(node.args))]
        kwargs = {name: self._argument(node, name, values) for name in node.kwargs}
        if node.target is operator.getitem:
            return args[0][args[1]]
        function = find_lowering(TARGET, node.target)
        if function is None and self._is_constant(node):
            make: Any = node.target
            return self.number(make(*node.args, **node.kwargs), self.dtype(node))
        if function is None:
            name = op_name(node.target)
            raise ExportError(
                f"the op {name} has no lowering to ONNX",
                hint=f'give it one where it is defined: @lowering("onnx", "{name}")',
            )
        try:
            return function(self, node, *args, **kwargs)
        except RerollError:
            raise
        except Exception as error:
            raise ExportError(
                f"lowering {op_name(node.target)}: {type(error).__name__}: {error}"
            ) from error

    def _is_constant(self, node: fx.Node) -> bool:
        """Whether an op always makes the same tensor, such as `linspace` of numbers."""
        tags = getattr(node.target, "tags", ())
        is_random = torch.Tag.nondeterministic_seeded in tags
        return not is_random and not node.all_input_nodes and "type" in node.meta

    # ---- nodes

    def op(self, kind: str, *inputs: Value | None, **attributes: Any) -> Value:
        """Add one ONNX node with one output; see `Graph.op`."""
        return self.graph.op(kind, *inputs, **attributes)

    def number(self, value: Any, dtype: torch.dtype) -> Value:
        """Return a number, or nested lists of numbers, as a constant."""
        return self.graph.constant(value, dtype)

    def ints(self, *values: int) -> Value:
        """Return a list of integers as a constant, for shapes and axes."""
        return self.graph.constant(list(values), INT)

    def tensor(
        self, value: Any, dtype: torch.dtype | None = None, rank: int | None = None
    ) -> Value:
        """Convert any argument to a tensor, in a dtype if one is given.

        `rank` is the rank of the tensor with which it is combined. A weight that differs by row
        then has its rows first.
        """
        if isinstance(value, Parameter):
            value = value.tensor(rank)
        elif isinstance(value, Size):
            value = self.op("Squeeze", value.value, self.ints(0))
        elif isinstance(value, Varying):
            value = value.tensor(dtype)
        elif not isinstance(value, Value):
            kind = dtype or (INT if isinstance(value, int) else self.settings.dtype)
            return self.number(value, torch.bool if isinstance(value, bool) else kind)
        return value if dtype is None else self.cast(value, dtype)

    def cast(self, value: Value, dtype: torch.dtype) -> Value:
        """Convert a value to a dtype, if it has another one."""
        if value.dtype == dtype:
            return value
        made = self.op("Cast", value, to=ELEMENT[dtype], dtype=dtype)
        return repeated(made, value.repeated)

    def real(self, dtype: torch.dtype, node: fx.Node | None = None) -> torch.dtype:
        """Return the dtype to compute in for a dtype of the Program.

        For complex dtypes, it is the dtype of the parts.
        """
        if dtype.is_complex:
            return torch.float32
        if not dtype.is_floating_point or dtype == torch.float64:
            return dtype
        return torch.float32 if node is not None and node in self.wide else self.settings.dtype

    def dtype(self, node: fx.Node) -> torch.dtype:
        """Return the dtype in ONNX of a node's result."""
        return self.real(node.meta["type"].dtype, node)

    # ---- sizes

    def size(self, dim: Dim) -> int | Size:
        """Return a dimension by its name in the Program: a number, or a size known at run time.

        Raises ExportError if no input has that size.
        """
        if isinstance(dim, int):
            return dim
        if dim in self.sizes:
            return Size(self, self.sizes[dim])
        if dim == "t" and (total := self.states.total(self)) is not None:
            self.sizes[dim] = total
            return Size(self, total)
        try:
            return Size(self, self._computed(ast.parse(dim, mode="eval").body))
        except (KeyError, SyntaxError) as error:
            raise ExportError(f"no input of the graph gives the size {dim!r}") from error

    def _computed(self, tree: ast.AST) -> Value:
        if isinstance(tree, ast.Constant):
            return self.ints(int(tree.value))  # type: ignore[arg-type]
        if isinstance(tree, ast.Name):
            found = self.size(tree.id) if tree.id in (*self.sizes, "t") else None
            if isinstance(found, Size):
                return found.value
            raise KeyError(tree.id)
        if isinstance(tree, ast.BinOp):
            sides = self._computed(tree.left), self._computed(tree.right)
            return self.op(_ARITHMETIC[type(tree.op)], *sides)
        if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name):
            return self.op(_FUNCTIONS[tree.func.id], *map(self._computed, tree.args))
        raise KeyError(ast.dump(tree))

    def shape(self, dims: Sequence[Any]) -> Value:
        """Combine sizes, numbers and names of dimensions into one tensor of int64."""
        dims = [self.size(d) if isinstance(d, str) else d for d in dims]
        if all(isinstance(d, int) for d in dims):
            return self.ints(*dims)
        parts = [d.value if isinstance(d, Size) else self.ints(d) for d in dims]
        return self.op("Concat", *parts, axis=0) if len(parts) > 1 else parts[0]

    def reshape(self, x: Value, before: Sequence[Dim], after: Sequence[Dim]) -> Value:
        """Reshape between two shapes of the Program, with as few run-time sizes as possible."""
        target: list[Any] = []
        for position, dim in enumerate(after):
            same = position < len(before) and before[: position + 1] == after[: position + 1]
            target.append(0 if same and isinstance(dim, str) else dim)
        open_ = [i for i, dim in enumerate(target) if isinstance(dim, str)]
        if len(open_) == 1:
            target[open_[0]] = -1
        return self.op("Reshape", x, self.shape(target))


def _inputs(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    return [n for node in nodes for n in node.all_input_nodes]


def _returned(graph: fx.Graph) -> tuple[Any, ...]:
    result: Any = next(iter(reversed(graph.nodes))).args[0]
    return tuple(result) if isinstance(result, tuple | list) else (result,)


# ---- depth loops: trips one after the other, or an ONNX Loop over rounds of them


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
            carry = _rounds(g, plan, segment, carry, inputs)
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
    given = [_body_input(g, value, trip) for value in inputs]
    before, g.trip = g.trip, trip
    name = f"{loop.name} {trip.numbers[0]}"
    try:
        if is_skipped:
            return run_skipping(g, trip.loop, name, carry, given)
        return g.walk(name, loop.body.graph, [*carry, *given])
    finally:
        g.trip = before


def _body_input(g: Translator, value: Any, trip: Trip) -> Any:
    """Return a body's input in the given trips."""
    if not isinstance(value, tuple):
        return value
    values = tuple(value[number] for number in trip.numbers)
    return values[0] if len(set(values)) == 1 else Varying(g, values, trip)


def _rounds(
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
