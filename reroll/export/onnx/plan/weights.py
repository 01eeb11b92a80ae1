"""Stored forms of weights, and the file of them: one copy, however many graphs read it.

The entries of a stacked weight are contiguous, so the stack and each entry are views of the same
bytes. A graph with unrolled trips reads entries, and a Loop gathers from the stack.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.weights.expressions import Meta

FILE = "weights.bin"

# the page size, because runtimes map the file into memory
_ALIGNMENT = 4096
# the largest tensor of indices, in bytes, that is stored in the graph for shape inference
_INLINE = 1024


@dataclass(frozen=True)
class Form:
    """Stored form of a weight: `make` computes it from the weight's own tensor.

    `name` identifies the form; "" is the unchanged tensor. `dtype` and `shape` are the result's.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[Tensor], Tensor] = field(compare=False)

    @property
    def bytes(self) -> int:
        """Bytes of one entry."""
        return math.prod(self.shape) * self.dtype.itemsize

    def named(self, weight: str) -> str:
        """Return the name of a weight in this form."""
        return f"{weight}.{self.name}" if self.name else weight


def plain(meta: Meta, dtype: torch.dtype) -> Form:
    """Return the form of an unchanged weight, in a dtype."""
    return Form("", dtype, meta.shape, lambda t: t.to(dtype))


def transposed(meta: Meta, dtype: torch.dtype) -> Form:
    """Return the form of a matrix, or a stack of them, as [inputs, outputs], which MatMul takes."""
    *several, rows, columns = meta.shape
    shape = (*several, columns, rows)
    return Form("transposed", dtype, shape, lambda t: t.to(dtype).transpose(-2, -1))


def offset(meta: Meta, dtype: torch.dtype, amount: float) -> Form:
    """Return the form of a weight plus a number, added in fp32."""
    return Form(f"plus_{amount:g}", dtype, meta.shape, lambda t: (t.float() + amount).to(dtype))


@dataclass(frozen=True)
class Region:
    """Position in the file of the entries of one weight in one form."""

    weight: str
    form: Form
    offset: int
    entries: int

    @property
    def name(self) -> str:
        """Name of the weight in this form."""
        return self.form.named(self.weight)

    @property
    def bytes(self) -> int:
        """Bytes of all entries."""
        return self.form.bytes * self.entries


@dataclass(frozen=True)
class Initializer:
    """A weight in one form, as a graph holds it.

    Attributes:
        name: its name in the graph, which is that of the first of several tied weights.
        weight: name of the weight in the Program.
        entry: number of the entry; None for the stack [entries, ...] of all.
        shape: shape in the graph.
        offset: position of its bytes in the file; None for a few integers inside of the graph.
    """

    name: str
    weight: str
    entry: int | None
    form: Form
    shape: tuple[int, ...]
    offset: int | None

    @property
    def bytes(self) -> int:
        """Number of its bytes."""
        return math.prod(self.shape) * self.form.dtype.itemsize


class Layout:
    """Layout of the weight file, in the order in which a plan names its initialisers.

    With `before`, the file has what that layout has as well: equal expressions are the same bytes.
    Names of weights in `regions` are those of the Program, for which they are computed.
    """

    def __init__(self, program: Program, before: Layout | None = None) -> None:
        self.weights = program.weights
        self.size: int = 0 if before is None else before.size
        self._regions: dict[Hashable, Region] = {}
        # where the earlier layout has the entries of a weight, by their expressions and form
        self._stacks: dict[Hashable, int] = {}
        self._entries: dict[Hashable, int] = {}
        if before is None:
            return
        for region in before.regions:
            entries = before.weights[region.weight].entries
            self._stacks.setdefault((entries, region.form), region.offset)
            for number, entry in enumerate(entries):
                offset = region.offset + number * region.form.bytes
                self._entries.setdefault((entry, region.form), offset)

    @property
    def regions(self) -> tuple[Region, ...]:
        """All regions, in the order of the file."""
        return tuple(self._regions.values())

    def initializer(
        self, weight: str, entry: int | None, form: Form, view: tuple[int, ...] | None = None
    ) -> Initializer:
        """Return an entry, or the stack of all; `view` is another shape of an entry's bytes."""
        if entry is not None and form.dtype == torch.int64 and form.bytes <= _INLINE:
            name = form.named(self.weights.stored_name(weight, entry))
            return Initializer(name, weight, entry, form, view or form.shape, None)
        entries = self.weights[weight].entries
        known = self._stacks.get((entries, form))
        if entry is not None:
            known = self._entries.get((entries[entry], form))
        first, offset = weight, known
        if known is None:
            region = self._region(weight, form)
            first, offset = region.weight, region.offset + (entry or 0) * form.bytes
        if entry is None:
            name, shape = first.replace("*", "all"), (len(entries), *form.shape)
        else:
            name, shape = self.weights.stored_name(first, entry), view or form.shape
        name = form.named(name) + (".view" if view else "")
        return Initializer(name, weight, entry, form, shape, offset)

    def _region(self, weight: str, form: Form) -> Region:
        """Return a weight's position, allocated at the first request; tied weights share theirs."""
        count = len(self.weights[weight].entries)
        key = (tuple(self.weights.identity(weight, i) for i in range(count)), form)
        if key not in self._regions:
            self.size += -self.size % _ALIGNMENT
            self._regions[key] = Region(weight, form, self.size, count)
            self.size += self._regions[key].bytes
        return self._regions[key]
