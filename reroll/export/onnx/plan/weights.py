"""The weight file: every weight is stored once, however many graphs read it.

The entries of a stacked weight are contiguous, so the stack and each entry are views of the same
bytes. A graph with unrolled trips reads entries, and a Loop gathers from the stack. Weights are
computed and written one at a time.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from onnx import TensorProto
from torch import Tensor

from reroll.errors import ExportError
from reroll.export.onnx.graph import ELEMENT, array_of
from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.weights import stored_name
from reroll.rewrite.ir.weights.evaluation import Output, evaluate_outputs
from reroll.rewrite.ir.weights.expressions import Meta

FILE = "weights.bin"

# the page size, because runtimes map the file into memory
_ALIGNMENT = 4096


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
    def bytes(self) -> int:
        """Bytes of all entries."""
        return self.form.bytes * self.entries


class WeightFile:
    """A plan of the weight file, from which graphs request tensors while they are built.

    `write` computes the requested tensors and writes the file.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.regions: dict[Any, Region] = {}
        self.size = 0

    def entry(
        self, weight: str, entry: int, form: Form, view: tuple[int, ...] | None = None
    ) -> tuple[str, TensorProto]:
        """Return the name and the external tensor of one entry, perhaps in another shape.

        `view` is that shape.
        """
        region = self._region(weight, form)
        name = stored_name(region.weight, entry)
        at = region.offset + entry * form.bytes
        name = _named(name, form) + (".view" if view else "")
        return self._tensor(name, form, view or form.shape, at, form.bytes)

    def stack(self, weight: str, form: Form) -> tuple[str, TensorProto]:
        """Return the name and the external tensor [entries, ...] of all entries."""
        region = self._region(weight, form)
        name = _named(region.weight.replace("*", "all"), form)
        shape = (region.entries, *form.shape)
        return self._tensor(name, form, shape, region.offset, region.bytes)

    def value(self, weight: str, entry: int) -> Tensor:
        """Compute one entry, unchanged."""
        output = Output(weight, entry, self.program.weights[weight].entries[entry])
        ((_, _, tensor),) = evaluate_outputs([output], self.program.source)
        return tensor

    def _region(self, weight: str, form: Form) -> Region:
        """Return a weight's position, allocated at the first request; tied weights share theirs."""
        count = len(self.program.weights[weight].entries)
        key = (tuple(self.program.weights.identity(weight, i) for i in range(count)), form)
        if key not in self.regions:
            self.size += -self.size % _ALIGNMENT
            self.regions[key] = Region(weight, form, self.size, count)
            self.size += self.regions[key].bytes
        return self.regions[key]

    def _tensor(
        self, name: str, form: Form, shape: tuple[int, ...], at: int, size: int
    ) -> tuple[str, TensorProto]:
        proto = TensorProto(name=name, data_type=ELEMENT[form.dtype], dims=shape)
        proto.data_location = TensorProto.EXTERNAL
        for key, value in (("location", FILE), ("offset", str(at)), ("length", str(size))):
            proto.external_data.add(key=key, value=value)
        return name, proto

    def write(self, directory: Path, progress: Callable[[int, int], None] | None = None) -> None:
        """Compute every requested weight, and write the file.

        Raises ExportError if the file cannot be written.
        """
        forms: dict[str, list[Region]] = {}
        for region in self.regions.values():
            forms.setdefault(region.weight, []).append(region)
        outputs = [
            Output(name, entry, expr)
            for name in forms
            for entry, expr in enumerate(self.program.weights[name].entries)
        ]
        total, done = sum(r.bytes for r in self.regions.values()), 0
        try:
            with (directory / FILE).open("wb") as file:
                file.truncate(self.size)
                for name, entry, tensor in evaluate_outputs(outputs, self.program.source):
                    for region in forms[name]:
                        file.seek(region.offset + entry * region.form.bytes)
                        file.write(_bytes(region.form, tensor))
                        done += region.form.bytes
                    if progress is not None:
                        progress(done, total)
        except OSError as error:
            raise ExportError(f"cannot be written: {error.strerror}", where=FILE) from error

    def digests(self, directory: Path) -> dict[str, str]:
        """Return the SHA-256 of every weight's bytes in the written file, by name."""
        found = {}
        with (directory / FILE).open("rb") as file:
            for region in self.regions.values():
                file.seek(region.offset)
                digest, left = hashlib.sha256(), region.bytes
                while left:
                    piece = file.read(min(left, 2**24))
                    digest.update(piece)
                    left -= len(piece)
                found[_named(region.weight, region.form)] = digest.hexdigest()
        return found


def _named(name: str, form: Form) -> str:
    return f"{name}.{form.name}" if form.name else name


def _bytes(form: Form, tensor: Tensor) -> Any:
    with torch.no_grad():
        made = form.make(tensor)
    assert tuple(made.shape) == form.shape, (form.name, tuple(made.shape), form.shape)
    assert made.dtype == form.dtype
    return array_of(made).reshape(-1).view("uint8").data
