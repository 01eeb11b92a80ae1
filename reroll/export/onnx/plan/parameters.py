"""Arguments of lowerings that are no values: weights, sizes, and what differs by trip."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from reroll.errors import ExportError
from reroll.export.onnx.graph import Value
from reroll.export.onnx.plan import weights as forms
from reroll.export.onnx.plan.weights import Form
from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.records import Dim
from reroll.rewrite.ir.weights import Weight
from reroll.rewrite.ir.weights.expressions import Meta

if TYPE_CHECKING:
    from reroll.export.onnx.emit.translate import Translator

# the largest tensor of indices, in bytes, that is stored in the graph for shape inference
_INLINE = 1024

AXES = {
    "b": "batch_size",
    "s": "sequence_length",
    "t": "total_sequence_length",
    "e": "encoder_sequence_length",
}


@dataclass(frozen=True)
class Settings:
    """Settings of an export: precision of computing and of weights, opset, runtime."""

    precision: str = "fp32"
    opset: int = 23
    block: int = 32
    runtime: str = "any"

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of floating-point values."""
        return torch.float16 if self.precision == "fp16" else torch.float32

    @property
    def bits(self) -> int | None:
        """Bits of a quantised weight; None if weights are not quantised."""
        return {"int8": 8, "int4": 4}.get(self.precision)

    def axes(self, shape: Sequence[Dim]) -> tuple[int | str | None, ...]:
        """Return a shape with the dimension names of runtimes; computed dimensions are None."""
        return tuple(
            d if isinstance(d, int) else AXES.get(d, d if d.isidentifier() else None) for d in shape
        )

    def wide_nodes(self, program: Program) -> set[fx.Node]:
        """Find floating-point nodes that depend on positions alone, which stay in fp32."""
        if self.dtype == torch.float32:
            return set()
        narrow: set[fx.Node] = set()
        floats: set[str] = {i.name for i in program.inputs if i.type.dtype.is_floating_point}
        loops = {loop.node: loop for loop in program.loops}

        def mark(graph: fx.Graph, places: dict[fx.Node, Any]) -> None:
            for node in graph.nodes:
                if node in places:
                    data = any(n in narrow for n in places[node])
                elif node.op == "placeholder":
                    data = str(node.target) in floats
                elif node.op == "get_attr":
                    data = program.weights[str(node.target)].trainable
                else:
                    data = any(n in narrow for n in node.all_input_nodes)
                if data:
                    narrow.add(node)
                if node in loops:
                    narrow.add(node)
                    loop = loops[node]
                    inner = loop.places
                    outer: list[tuple[fx.Node, ...]] = [(node,)] * len(loop.carry)
                    outer += [nodes_in(value) for value in loop.inputs]
                    mark(loop.body.graph, dict(zip(inner, outer, strict=True)))

        mark(program.graph, {})
        every = {n for _, graph in program.graphs() for n in graph.nodes}
        return every - narrow


def nodes_in(value: Any) -> tuple[fx.Node, ...]:
    """Return the nodes in an argument."""
    found: list[fx.Node] = []
    fx.node.map_arg(value, found.append)
    return tuple(found)


@dataclass(frozen=True)
class Trip:
    """Trips of a loop that the nodes being emitted belong to.

    `repeat` is the position in `numbers` at run time, a scalar int64, or None if there is only one
    trip. With `rows` it is a vector: one position for each row of the batch.
    """

    numbers: tuple[int, ...]
    repeat: Value | None = None
    rows: bool = False


@dataclass(frozen=True)
class Size:
    """A size known at run time only: int64 [1]."""

    g: Translator
    value: Value


@dataclass(frozen=True)
class Varying:
    """An argument with one value for each trip."""

    g: Translator
    values: tuple[Any, ...]
    trip: Trip

    def tensor(self, dtype: torch.dtype | None = None) -> Value:
        """Return the value of the running trip, which is a number or a tensor.

        Raises ExportError for other values, and for tensors that differ by row.
        """
        distinct = list(dict.fromkeys(self.values))
        assert self.trip.repeat is not None
        place = select(self.g, [distinct.index(v) for v in self.values], self.trip)
        if all(isinstance(v, Value) for v in distinct):
            if self.trip.rows:
                raise ExportError("a tensor that differs by trip cannot be selected by row")
            stack = self.g.op("Concat", *(self._lifted(v) for v in distinct), axis=0)
            made = self.g.op("Gather", stack, place, axis=0)
            return Value(made.name, made.dtype, made.scope, all(v.repeated for v in distinct))
        if not all(isinstance(v, int | float) for v in distinct):
            raise ExportError(
                f"an argument is {self.values} from trip to trip, which a Loop cannot express",
                hint="export this model with --graphs unrolled",
            )
        kind = dtype or (torch.int64 if isinstance(distinct[0], int) else self.g.settings.dtype)
        return self.g.op("Gather", self.g.number(distinct, kind), place, axis=0)

    def _lifted(self, value: Value) -> Value:
        return self.g.op("Unsqueeze", value, self.g.ints(0))


def select(g: Translator, table: Sequence[int], trip: Trip) -> Value:
    """Return the entry of a table that belongs to the running trip."""
    assert trip.repeat is not None
    if list(table) == list(range(len(trip.numbers))):
        return trip.repeat
    return g.op("Gather", g.number(list(table), torch.int64), trip.repeat, axis=0)


@dataclass(frozen=True)
class Parameter:
    """A weight of the Program, whose stored form is not chosen yet."""

    g: Translator
    name: str
    weight: Weight
    trip: Trip | None
    # whether the last two dimensions are exchanged
    is_transposed: bool = False

    def transposed(self) -> Parameter:
        """Return the weight with its last two dimensions exchanged in the file."""
        return replace(self, is_transposed=not self.is_transposed)

    @cached_property
    def entries(self) -> tuple[int, ...]:
        """Entry of the weight in each of the trips."""
        if self.trip is None or self.weight.index is None:
            return (0,)
        return tuple(self.weight.index[number] for number in self.trip.numbers)

    @property
    def by_rows(self) -> bool:
        """Whether each row of the batch has an entry of its own."""
        return self.trip is not None and self.trip.rows and len(set(self.entries)) > 1

    @property
    def meta(self) -> Meta:
        """Shape and dtype in the Program."""
        return self.weight.meta

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in ONNX; weights that are not trained, such as rotary frequencies, stay in fp32."""
        if not self.meta.dtype.is_floating_point:
            return self.meta.dtype
        return self.g.settings.dtype if self.weight.trainable else torch.float32

    def plain(self, rank: int | None = None) -> Value:
        """Return the weight without another form; if it differs by row, with the given rank.

        Raises ExportError if it differs by row and no rank is given.
        """
        if self.by_rows and rank is None:
            raise ExportError(
                f"{self.name} differs from round to round, and is read by an op that cannot take "
                "one value for each row",
                hint="export this model with --graphs loop,unrolled",
            )
        return self.as_(self.form, rank)

    @property
    def form(self) -> Form:
        """Form of the weight where an op takes it directly."""
        form = forms.transposed if self.is_transposed else forms.plain
        return form(self.meta, self.dtype)

    def as_(
        self, form: Form, rank: int | None = None, view: tuple[int, ...] | None = None
    ) -> Value:
        """Return the weight in a form; `view` reshapes its bytes, outside of loops only."""
        g = self.g
        file, entries = g.weights, self.entries
        if len(set(entries)) == 1:
            if form.dtype == torch.int64 and form.bytes <= _INLINE:
                value = form.make(file.value(self.name, entries[0]))
                return g.graph.constant(value.reshape(view or form.shape), form.dtype)
            return g.graph.stored(*file.entry(self.name, entries[0], form, view), form.dtype)
        assert self.trip is not None
        stack = g.graph.stored(*file.stack(self.name, form), form.dtype)
        made = g.op("Gather", stack, select(g, entries, self.trip), axis=0, hint=_short(self.name))
        if self.by_rows and rank is not None and rank > len(form.shape) + 1:
            made = g.op("Unsqueeze", made, g.ints(*range(1, rank - len(form.shape))))
        return made

    def slice(self, position: Value) -> Value:
        """Return one index of the first dimension, given at run time, without reading the others.

        Raises ExportError if the weight differs by row.
        """
        g, form, entries = self.g, self.form, self.entries
        if len(set(entries)) == 1:
            return g.op("Gather", self.as_(form), position, axis=0, hint=_short(self.name))
        assert self.trip is not None
        if self.by_rows:
            raise ExportError(
                f"{self.name} differs from round to round, and experts cannot be selected by row",
                hint="export this model with --graphs loop,unrolled",
            )
        stack = g.graph.stored(*g.weights.stack(self.name, form), form.dtype)
        where = (select(g, entries, self.trip), position)
        both = g.op("Concat", *(g.op("Unsqueeze", v, g.ints(0)) for v in where), axis=0)
        return g.op("GatherND", stack, both, hint=_short(self.name))


def is_looked_up(program: Program, name: str) -> bool:
    """Whether a weight is a table of embeddings, which is then stored untransposed."""
    tables = (torch.ops.aten.embedding.default, torch.ops.aten.index.Tensor)
    return any(
        node.op == "get_attr" and str(node.target) == name and user.target in tables
        for _, graph in program.graphs()
        for node in graph.nodes
        for user in node.users
    )


def _short(name: str) -> str:
    return ".".join(name.split(".")[-2:])


@dataclass(frozen=True)
class Scan:
    """A value of a Loop's body in every round, and the function that takes their stack."""

    value: Value
    take: Callable[[Value], None]
