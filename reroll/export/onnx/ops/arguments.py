"""Arguments of lowerings that are no values: weights, sizes, and what differs by trip."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from onnx import TensorProto
from torch import fx

from reroll.errors import ExportError
from reroll.export.onnx.graph import ELEMENT, Value
from reroll.export.onnx.plan.reading import Read, Ref
from reroll.export.onnx.plan.segments import Trips
from reroll.export.onnx.plan.weights import FILE, Initializer
from reroll.rewrite.ir.matching import shape
from reroll.rewrite.ir.weights.evaluation import Output, evaluate_outputs

if TYPE_CHECKING:
    from reroll.export.onnx.emit.translate import Translator


@dataclass(frozen=True)
class Trip(Trips):
    """Trips of a loop that the nodes being emitted belong to.

    `repeat` is the position in `numbers` at run time, a scalar int64, or None if there is only one
    trip. With `by_row` it is a vector: one position for each row of the batch.
    """

    repeat: Value | None = None


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
            if self.trip.by_row:
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
    """A weight as an argument of a node, and how the plan lets the argument read it."""

    g: Translator
    ref: Ref
    read: Read

    @property
    def name(self) -> str:
        """Name in the Program."""
        return self.ref.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the Program."""
        return self.g.program.weights[self.name].meta.shape

    @property
    def by_row(self) -> bool:
        """Whether each row of the batch has an entry of its own."""
        return self.read.by_row

    def tensor(self, rank: int | None = None) -> Value:
        """Return the weight in its planned form; if it differs by row, with the given rank.

        Raises ExportError if it differs by row and no rank is given.
        """
        if self.by_row and rank is None:
            raise ExportError(
                f"{self.name} differs from round to round, and is read by an op that cannot take "
                "one value for each row",
                hint="export this model with --graphs loop,unrolled",
            )
        g, (made, *_) = self.g, self.tensors()
        sizes = self.read.initializers[0].form.shape
        if self.by_row and rank is not None and rank > len(sizes) + 1:
            made = g.op("Unsqueeze", made, g.ints(*range(1, rank - len(sizes))))
        return made

    def tensors(self) -> list[Value]:
        """Return the tensors of the weight's form: of a quantised one, there are several."""
        return [self._taken(item) for item in self.read.initializers]

    def _taken(self, item: Initializer) -> Value:
        """Return an initialiser; of a stack, the entry of the running trip."""
        g = self.g
        if item.offset is None:
            return _inside(g, item)
        value = g.graph.stored(item.name, _external(item), item.form.dtype)
        if item.entry is not None:
            return value
        assert g.trip is not None
        place = select(g, self.read.entries, g.trip)
        return g.op("Gather", value, place, axis=0, hint=_short(self.name))

    def slice(self, position: Value) -> Value:
        """Return one index of the first dimension, given at run time, without reading the others.

        Raises ExportError if the weight differs by row.
        """
        g, (item, *_) = self.g, self.read.initializers
        if item.entry is not None:
            return g.op("Gather", self._taken(item), position, axis=0, hint=_short(self.name))
        assert g.trip is not None
        if self.by_row:
            raise ExportError(
                f"{self.name} differs from round to round, and experts cannot be selected by row",
                hint="export this model with --graphs loop,unrolled",
            )
        stack = g.graph.stored(item.name, _external(item), item.form.dtype)
        where = (select(g, self.read.entries, g.trip), position)
        both = g.op("Concat", *(g.op("Unsqueeze", v, g.ints(0)) for v in where), axis=0)
        return g.op("GatherND", stack, both, hint=_short(self.name))


def _external(item: Initializer) -> TensorProto:
    """Return a tensor whose data are in the weight file."""
    proto = TensorProto(name=item.name, data_type=ELEMENT[item.form.dtype], dims=item.shape)
    proto.data_location = TensorProto.EXTERNAL
    where = (("location", FILE), ("offset", str(item.offset)), ("length", str(item.bytes)))
    for key, value in where:
        proto.external_data.add(key=key, value=value)
    return proto


def _inside(g: Translator, item: Initializer) -> Value:
    """Return a weight of a few integers as a constant of the graph."""
    assert item.entry is not None
    output = Output(item.weight, item.entry, g.program.weights[item.weight].entries[item.entry])
    ((_, _, tensor),) = evaluate_outputs([output], g.program.source)
    return g.graph.constant(item.form.make(tensor).reshape(item.shape), item.form.dtype)


def _short(name: str) -> str:
    return ".".join(name.split(".")[-2:])


@dataclass(frozen=True)
class Scan:
    """A value of a Loop's body in every round, and the function that takes their stack."""

    value: Value
    take: Callable[[Value], None]


def shape_of(node: fx.Node, argument: int = 0) -> tuple[Any, ...]:
    """Return the shape of one of a node's arguments; empty for a number."""
    source: Any = node.args[argument]
    return shape(source) if isinstance(source, fx.Node) else ()


def repeated(value: Value, is_repeated: bool) -> Value:
    """Mark a value as one half twice in its last dimension, or remove the mark."""
    if value.repeated == is_repeated:
        return value
    return Value(value.name, value.dtype, value.scope, is_repeated)
