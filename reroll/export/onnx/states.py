"""Key/value caches as inputs and outputs: what was before, and what there is after.

The caches of all layers that keep one are numbered in the order in which they run, under the names
that optimum, transformers.js and onnxruntime-genai use: `past_key_values.N.key` [batch, kv_heads,
past, head_dim] goes in, `present.N.key` with the new tokens at its end comes out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from reroll.export.onnx.graph import Value
from reroll.export.onnx.parameters import Scan, select
from reroll.rewrite.program import Program
from reroll.rewrite.raising.matching import argument, shape
from reroll.runtime.caches import numbering

if TYPE_CHECKING:
    from reroll.export.onnx.translate import Translator

PAST, PRESENT = "past_key_values.{}.{}", "present.{}.{}"
PARTS = ("key", "value")


@dataclass(frozen=True)
class CacheShape:
    """The sizes of one cache layer's keys and values: (kv_heads, head_dim) of each."""

    key: tuple[int, int]
    value: tuple[int, int]


class States:
    """The caches of one graph."""

    def __init__(self, program: Program) -> None:
        self.numbers: dict[fx.Node, tuple[int, ...]] = numbering(program)
        shapes: dict[int, CacheShape] = {}
        for node, numbers in self.numbers.items():
            k, v = (shape(argument(node, part)) for part in ("k", "v"))
            for number in numbers:
                shapes[number] = CacheShape((k[1], k[3]), (v[1], v[3]))
        self.shapes = [shapes[number] for number in sorted(shapes)]
        self.past: dict[tuple[int, str], Value] = {}
        self.present: dict[tuple[int, str], Value] = {}

    def add_inputs(self, g: Translator) -> None:
        """The caches so far, as inputs of the graph."""
        for number, kind in enumerate(self.shapes):
            for part in PARTS:
                heads, width = getattr(kind, part)
                self.past[number, part] = g.graph.input(
                    PAST.format(number, part),
                    g.settings.dtype,
                    ("batch_size", heads, "past_sequence_length", width),
                )

    def add_outputs(self, g: Translator) -> None:
        """The caches with the new tokens, as outputs of the graph."""
        for number, kind in enumerate(self.shapes):
            for part in PARTS:
                heads, width = getattr(kind, part)
                g.graph.output(
                    self.present[number, part],
                    PRESENT.format(number, part),
                    ("batch_size", heads, "total_sequence_length", width),
                )

    def total(self, g: Translator) -> Value | None:
        """How many tokens there are, past and new; None without a cache."""
        if not self.past or "s" not in g.sizes:
            return None
        past = g.op("Shape", self.past[0, "key"], start=2, end=3, dtype=torch.int64)
        return g.op("Add", past, g.sizes["s"])

    def append(self, g: Translator, node: fx.Node, k: Value, v: Value) -> tuple[Value, Value]:
        """The keys and values of all tokens, given those of the new ones."""
        numbers = self.numbers[node]
        if g.trip is not None:
            numbers = tuple(numbers[trip] for trip in g.trip.numbers)
        made = []
        for part, new in zip(PARTS, (k, v), strict=True):
            new = g.cast(new, g.settings.dtype)
            past = [self.past[number, part] for number in numbers]
            before = past[0] if len(past) == 1 else self._running(g, past)
            total = g.op("Concat", before, new, axis=2, hint=part)
            made.append(total)
            if len(past) == 1:
                self.present[numbers[0], part] = total
            else:
                self._collect(g, numbers, part, new)
        return made[0], made[1]

    def _running(self, g: Translator, past: list[Value]) -> Value:
        """The cache of the running trip."""
        assert g.trip is not None
        sizes = g.op("Shape", past[0], dtype=torch.int64)
        sizes = g.op("Concat", g.ints(len(past)), sizes, axis=0)
        # one copy: a reshape of what was just made costs nothing
        stack = g.op("Reshape", g.op("Concat", *past, axis=0), sizes, allowzero=1)
        return g.op("Gather", stack, select(g, range(len(past)), g.trip), axis=0)

    def _collect(self, g: Translator, numbers: tuple[int, ...], part: str, new: Value) -> None:
        """Have the Loop hand out the new tokens of every round, and append them outside."""

        def take(stack: Any) -> None:
            for position, number in enumerate(numbers):
                own = g.op("Gather", stack, g.number(position, torch.int64), axis=0)
                past = self.past[number, part]
                self.present[number, part] = g.op("Concat", past, own, axis=2)

        g.scans.append(Scan(new, take))
