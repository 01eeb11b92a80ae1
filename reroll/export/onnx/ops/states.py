"""States of a graph while it is written: inputs, and what becomes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import fx

from reroll.errors import ExportError
from reroll.export.onnx.graph import Value
from reroll.export.onnx.ops.arguments import Scan, select
from reroll.export.onnx.ops.heads import Appended
from reroll.export.onnx.plan.graphs import GraphPlan
from reroll.export.onnx.plan.states import Parts, Ring

if TYPE_CHECKING:
    from reroll.export.onnx.emit.translate import Translator

INT = torch.int64


class States:
    """States of one graph, as its plan has them."""

    def __init__(self, plan: GraphPlan) -> None:
        self.plan = plan
        self.past: dict[tuple[int, str], Value] = {}
        self.present: dict[tuple[int, str], Value] = {}

    def ring(self, number: int) -> Ring | None:
        """Return the tokens that a cache keeps if it keeps a window only, else None."""
        return self.plan.rings.get(number)

    def add_inputs(self, g: Translator) -> None:
        """Add all states before the new tokens as inputs of the graph."""
        for state in self.plan.states:
            value = g.graph.input(state.input, state.dtype, state.shape)
            self.past[state.number, state.part] = value
            if state.is_idle:
                self.present[state.number, state.part] = value

    def add_outputs(self, g: Translator) -> None:
        """Add all states after the new tokens as outputs of the graph."""
        for state in self.plan.states:
            value = self.present[state.number, state.part]
            g.graph.output(value, state.output, state.shape_after)

    def total(self, g: Translator) -> Value | None:
        """Return the number of tokens, past and new, or None without a cache that grows."""
        growing = [s for s in self.plan.states if s.grows]
        if not growing or "s" not in g.sizes:
            return None
        first = self.past[growing[0].number, growing[0].part]
        past = g.op("Shape", first, start=2, end=3, dtype=INT)
        return g.op("Add", past, g.sizes["s"])

    # ---- states of the running trip

    def of(self, g: Translator, node: fx.Node) -> tuple[int, ...]:
        """Return the numbers of a node's states in the running trips."""
        numbers = self.plan.numbers[node]
        return numbers if g.trip is None else g.trip.states(numbers)

    def read(self, g: Translator, numbers: Sequence[int], part: str) -> Value:
        """Return one part of the state before the run, of the running trip.

        Raises ExportError if the plan has no such part.
        """
        try:
            past = [self.past[number, part] for number in numbers]
        except KeyError as error:
            raise ExportError(
                f"the state {part!r} is not planned",
                hint='register the sizes of a mixer\'s states: @lowering("onnx", "states:NAME")',
            ) from error
        if len(past) == 1:
            return past[0]
        assert g.trip is not None
        sizes = g.op("Concat", g.ints(len(past)), g.op("Shape", past[0], dtype=INT), axis=0)
        # only the concatenation copies; the reshape does not
        stack = g.op("Reshape", g.op("Concat", *past, axis=0), sizes, allowzero=1)
        return g.op("Gather", stack, select(g, range(len(past)), g.trip), axis=0)

    def write(self, g: Translator, numbers: Sequence[int], part: str, value: Value) -> None:
        """Set one part of the state after the run, of the running trip."""
        if len(numbers) == 1:
            self.present[numbers[0], part] = value
        else:
            self._collect(g, numbers, part, value, grows=False)

    def append(self, g: Translator, node: fx.Node, k: Value, v: Value) -> tuple[Value, Value]:
        """Append new keys and values to a cache, and return those of all tokens."""
        numbers = self.of(g, node)
        made = {"key": k, "value": v}
        for part in [part for part in made if (numbers[0], part) in self.past]:
            new = g.cast(made[part], g.settings.dtype)
            past = self.read(g, numbers, part)
            total = g.op("Concat", past, new, axis=2, hint=part)
            number = numbers[0] if len(numbers) == 1 else None
            made[part] = replace(total, appended=Appended(past, new, number, part))
            if len(numbers) == 1:
                self.present[numbers[0], part] = total
            else:
                self._collect(g, numbers, part, new, grows=True)
        return made["key"], made["value"]

    def _collect(
        self, g: Translator, numbers: Sequence[int], part: str, new: Value, *, grows: bool
    ) -> None:
        """Let the Loop return a value of every round: each a state, or appended to one."""

        def take(stack: Value) -> None:
            for position, number in enumerate(numbers):
                own = g.op("Gather", stack, g.number(position, INT), axis=0)
                past = self.past[number, part] if grows else None
                whole = own if past is None else g.op("Concat", past, own, axis=2)
                self.present[number, part] = whole

        g.scans.append(Scan(new, take))


class NoStates:
    """Replacement of `States` in which every state begins with zeros, and none is stored."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts

    def of(self, g: Translator, node: fx.Node) -> tuple[int, ...]:
        """Return no numbers."""
        return ()

    def read(self, g: Translator, numbers: Sequence[int], part: str) -> Value:
        """Return zeros."""
        return g.op("Expand", g.number(0.0, torch.float32), g.shape(["b", *self.parts[part]]))

    def write(self, g: Translator, numbers: Sequence[int], part: str, value: Value) -> None:
        """Do nothing."""
