"""States as inputs and outputs of a graph: the state before a run, and the state after it.

Every node that keeps state is numbered in running order. Its inputs are `past_key_values.N.PART`
and its outputs `present.N.PART`, the names that optimum, transformers.js and onnxruntime-genai use:

    key, value               [batch, kv_heads, past, head_dim]: all tokens so far, the new ones last
    key                      alone, where keys say which tokens are read and have no values
    key, value               [batch, kv_heads, window - 1, head_dim] where a window never looks
                             further back; zeros stand before the first token
    first_key, first_value   [batch, kv_heads, prefix, head_dim]: the first tokens, beside a window
    recurrent_state          [batch, kv_heads, ...]: the state of a recurrence
    maximum, slot_keys       additional states of some mixers: see `mixers`
    conv_state               [batch, ...]: the last tokens, for mixers that read them; [batch, 1, 1]
                             and never used where onnxruntime-genai needs one beside a recurrence
    waiting                  [batch, kv_heads, delay, channels]: tokens that a delayed recurrence
                             has not written yet
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from reroll.export.onnx.graph import Value
from reroll.export.onnx.ops.grouped import Appended
from reroll.export.onnx.plan.parameters import Scan, select
from reroll.rewrite.analysis.state_plan import CacheLayer, plan_states
from reroll.rewrite.ir.matching import argument, shape
from reroll.rewrite.ir.ops import ATTENTION, CACHE, RECURRENCE
from reroll.rewrite.ir.program import Program

if TYPE_CHECKING:
    from reroll.export.onnx.emit.translate import Translator

PAST, PRESENT = "past_key_values.{}.{}", "present.{}.{}"
RECURRENT, CONV = "recurrent_state", "conv_state"
GROWS = "past_sequence_length"
INT = torch.int64


class States:
    """States of one graph."""

    def __init__(self, program: Program) -> None:
        self.numbers, self.layers = (plan := plan_states(program)).numbers, plan.layers
        self.rings = keeps_rings(program)
        self.past: dict[tuple[int, str], Value] = {}
        self.present: dict[tuple[int, str], Value] = {}
        self.shapes: dict[tuple[int, str], tuple[int | str, ...]] = {}

    def ring(self, number: int) -> CacheLayer | None:
        """Return the layer of this number if it keeps a window only, else None."""
        layer = self.layers[number]
        return layer if self.rings and layer.layer_type == "sliding_attention" else None

    def add_inputs(self, g: Translator) -> None:
        """Add the caches that grow as inputs of the graph; other states become inputs when read."""
        for node, numbers in self.numbers.items():
            if node.target is not CACHE:
                continue
            for number in numbers:
                if self.ring(number) is None:
                    for part, kind in _parts(node):
                        self._slot(g, number, part, (kind[0], GROWS, kind[1]))

    def add_outputs(self, g: Translator) -> None:
        """Add all states after the new tokens as outputs of the graph."""
        if self._suits_genai():
            for number in [n for n, part in self.shapes if part == RECURRENT]:
                if (number, CONV) not in self.shapes:
                    self.present[number, CONV] = self._slot(g, number, CONV, (1, 1), torch.float32)
        for (number, part), dims in self.shapes.items():
            after = ["total_sequence_length" if d == GROWS else d for d in dims]
            name = PRESENT.format(number, part)
            g.graph.output(self.present[number, part], name, ("batch_size", *after))

    def _suits_genai(self) -> bool:
        """Whether onnxruntime-genai supports states of these names.

        It finds the layers with a recurrence by their convolution, and so needs one in all of them.
        """
        return all(
            part in (RECURRENT, CONV) or (part in ("key", "value") and GROWS in dims)
            for (_, part), dims in self.shapes.items()
        )

    def _slot(
        self,
        g: Translator,
        number: int,
        part: str,
        dims: tuple[int | str, ...],
        dtype: torch.dtype | None = None,
    ) -> Value:
        """Return one state before the run, as an input; `dims` are those after the batch."""
        if (number, part) not in self.past:
            root = g.graph.root
            kind = dtype or g.settings.dtype
            name = PAST.format(number, part)
            self.past[number, part] = root.input(name, kind, ("batch_size", *dims))
            self.shapes[number, part] = dims
        return self.past[number, part]

    def total(self, g: Translator) -> Value | None:
        """Return the number of tokens, past and new, or None without a cache that grows."""
        growing = [k for k, dims in self.shapes.items() if GROWS in dims]
        if not growing or "s" not in g.sizes:
            return None
        past = g.op("Shape", self.past[growing[0]], start=2, end=3, dtype=INT)
        return g.op("Add", past, g.sizes["s"])

    # ---- states of the running trip

    def of(self, g: Translator, node: fx.Node) -> tuple[int, ...]:
        """Return the numbers of a node's states in the running trips."""
        numbers = self.numbers[node]
        if g.trip is None:
            return numbers
        # with rows, the host passes the states of each row's own round
        trips = g.trip.numbers[:1] if g.trip.rows else g.trip.numbers
        return tuple(numbers[t] for t in trips)

    def read(
        self,
        g: Translator,
        numbers: Sequence[int],
        part: str,
        dims: tuple[int | str, ...],
        dtype: torch.dtype | None = None,
    ) -> Value:
        """Return one part of the state before the run, of the running trip."""
        past = [self._slot(g, number, part, dims, dtype) for number in numbers]
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
            return

        def take(stack: Value) -> None:
            for position, number in enumerate(numbers):
                own = g.op("Gather", stack, g.number(position, INT), axis=0)
                self.present[number, part] = own

        g.scans.append(Scan(value, take))

    def append(self, g: Translator, node: fx.Node, k: Value, v: Value) -> tuple[Value, Value]:
        """Append new keys and values to a cache, and return those of all tokens."""
        numbers = self.of(g, node)
        made = {"key": k, "value": v}
        for part, kind in _parts(node):
            new = g.cast(made[part], g.settings.dtype)
            dims = (kind[0], GROWS, kind[1])
            past = self.read(g, numbers, part, dims)
            total = g.op("Concat", past, new, axis=2, hint=part)
            number = numbers[0] if len(numbers) == 1 else None
            made[part] = replace(total, appended=Appended(past, new, number, part))
            if len(numbers) == 1:
                self.present[numbers[0], part] = total
            else:
                self._collect(g, numbers, part, new)
        return made["key"], made["value"]

    def _collect(self, g: Translator, numbers: Sequence[int], part: str, new: Value) -> None:
        """Let the Loop return the new tokens of every round, and append them outside."""

        def take(stack: Value) -> None:
            for position, number in enumerate(numbers):
                own = g.op("Gather", stack, g.number(position, INT), axis=0)
                past = self.past[number, part]
                self.present[number, part] = g.op("Concat", past, own, axis=2)

        g.scans.append(Scan(new, take))


def _parts(node: fx.Node) -> list[tuple[str, tuple[int, int]]]:
    """Return the parts of a cache and their (kv_heads, head_dim); values may be absent."""
    found = []
    for part, name in (("key", "k"), ("value", "v")):
        sizes: Any = shape(argument(node, name))
        if sizes[3]:
            found.append((part, (sizes[1], sizes[3])))
    return found


def keeps_rings(program: Program) -> bool:
    """Whether windows store only the tokens that they see.

    They do where a pass has replaced attention by a window or a recurrence, and the padding mask
    gives the number of tokens. Original models keep the caches that runtimes expect.
    """
    if not any(i.role == "padding" for i in program.inputs):
        return False
    for _, graph in program.graphs():
        for node in graph.nodes:
            if node.target is RECURRENCE:
                return True
            if node.target is ATTENTION and argument(node, "prefix") is not None:
                return True
    return False
