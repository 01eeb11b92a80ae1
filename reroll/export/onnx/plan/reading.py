"""How the arguments of nodes read weights: as they are, transposed, quantised, or not at all."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import fx

from reroll.export.onnx.plan import quantise
from reroll.export.onnx.plan.segments import Trips
from reroll.export.onnx.plan.settings import Settings
from reroll.export.onnx.plan.weights import Form, Initializer, Layout, offset, plain, transposed
from reroll.rewrite.ir.lowerings import op_name
from reroll.rewrite.ir.matching import shape
from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.weights import Weight

How = Literal["plain", "transposed", "offset", "quantised", "turned", "unread"]

# position of an argument among the positional ones, or its name
Slot = int | str


@dataclass(frozen=True)
class Ref:
    """A weight at one place of a graph.

    Attributes:
        trips: the trips in which its reader runs; None outside of loops.
        by_row: whether each row of the batch is in a trip of its own.
        is_transposed: whether its last two dimensions are exchanged.
    """

    name: str
    trips: tuple[int, ...] | None = None
    by_row: bool = False
    is_transposed: bool = False

    @classmethod
    def of(cls, node: fx.Node, trips: Trips | None) -> Ref:
        """Return the weight that a `get_attr` node is in some trips."""
        name = str(node.target)
        return cls(name) if trips is None else cls(name, trips.numbers, trips.by_row)

    def turned(self) -> Ref:
        """Return the weight with its last two dimensions exchanged in the file."""
        return replace(self, is_transposed=not self.is_transposed)

    def entries(self, weight: Weight) -> tuple[int, ...]:
        """Return the entry of the weight in each of the trips."""
        if self.trips is None or weight.index is None:
            return (0,)
        return tuple(weight.index[number] for number in self.trips)


@dataclass(frozen=True)
class Read:
    """How one argument of a node reads a weight.

    Attributes:
        how: "turned" if the node only exchanges dimensions, which is done in the file; "unread" if
            it needs no more than the shape.
        entries: the entry in each trip; (one,) if they are the same.
        by_row: whether each row of the batch has an entry of its own.
        initializers: the tensor that it reads; of a quantised weight integers, scales, zero points.
    """

    how: How
    entries: tuple[int, ...] = ()
    by_row: bool = False
    initializers: tuple[Initializer, ...] = ()


# arguments of which an op needs the shape only
_UNREAD: dict[str, tuple[Slot, ...]] = {
    **{
        f"aten::{name}.default": (0,)
        for name in ("zeros_like", "ones_like", "full_like", "empty_like", "copy",
                     "new_zeros", "new_ones", "new_full", "new_empty")
    },
    **dict.fromkeys(("aten::fill.Scalar", "aten::sym_size.int"), (0,)),
    **{
        f"aten::{name}": (1,)
        for name in ("view_as.default", "reshape_as.default", "expand_as.default",
                     "type_as.default", "to.other")
    },
}  # fmt: skip

CONCATENATIONS = ("aten::cat.default", "aten::concat.default", "aten::concatenate.default")

_MATRICES: dict[str, Slot] = {"aten::linear.default": 1, "reroll::exit_linear.default": 3}

EXCHANGES = (
    "aten::transpose.int",
    "aten::swapaxes.default",
    "aten::swapdims.default",
    "aten::t.default",
    "aten::mT.default",
)


def plan_read(
    program: Program, settings: Settings, layout: Layout, node: fx.Node, slot: Slot, ref: Ref
) -> Read:
    """Plan how an argument of a node reads a weight, and where the file has it."""
    weight = program.weights[ref.name]
    entries = ref.entries(weight)
    if len(set(entries)) == 1:
        entries = entries[:1]
    by_row = ref.by_row and len(entries) > 1
    how, found = _forms(program, settings, node, slot, ref, by_row)
    entry = entries[0] if len(entries) == 1 else None
    planned = [layout.initializer(ref.name, entry, form) for form in found]
    if how == "quantised" and node.target is torch.ops.aten.embedding.default:
        planned[0] = layout.initializer(ref.name, entry, found[0], view=weight.meta.shape)
    return Read(how, entries, by_row, tuple(planned))


def _forms(
    program: Program, settings: Settings, node: fx.Node, slot: Slot, ref: Ref, by_row: bool
) -> tuple[How, tuple[Form, ...]]:
    """Return how a weight is read, and in which forms."""
    weight = program.weights[ref.name]
    meta, dtype = weight.meta, weight.meta.dtype
    if dtype.is_floating_point:
        # weights that are not trained, such as rotary frequencies, stay in fp32
        dtype = settings.dtype if weight.trainable else torch.float32
    op = op_name(node.target) if node.op == "call_function" else ""
    bits = None if by_row else quantise.bits_of(settings, program, ref.name)
    # torch lets an empty vector be among tensors of any rank
    is_left_out = op in CONCATENATIONS and meta.shape == (0,) and len(shape(node)) != 1
    if is_left_out or slot in _UNREAD.get(op, ()):
        return "unread", ()
    if slot == 0 and op in EXCHANGES and exchanged(node) == (-2, -1):
        return "turned", ()
    if slot == _MATRICES.get(op) and not ref.is_transposed:
        if bits is not None:
            return "quantised", quantise.forms(meta, bits, settings.block)
        if not quantise.is_looked_up(program, ref.name):
            return "transposed", (transposed(meta, dtype),)
    elif slot == 0 and op == "aten::embedding.default" and bits is not None:
        return "quantised", quantise.forms(meta, 8, settings.block)
    elif slot == 1 and op == "reroll::rms_norm.default" and _offset(node):
        return "offset", (offset(meta, dtype, _offset(node)),)
    if ref.is_transposed:
        return "transposed", (transposed(meta, dtype),)
    return "plain", (plain(meta, dtype),)


def exchanged(node: fx.Node) -> tuple[int, int]:
    """Return the two dimensions that a node exchanges, counted from the end."""
    rank = len(shape(node))
    if op_name(node.target) == "aten::mT.default":
        return -2, -1
    given: Any = node.args[1:]
    first, second = sorted(d % rank - rank for d in (*given, *(0, 1)[len(given) :]))
    return first, second


def _offset(node: fx.Node) -> float:
    value: Any = node.args[3] if len(node.args) > 3 else node.kwargs.get("offset", 0.0)
    return float(value)
