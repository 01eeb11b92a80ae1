"""The layers of a Program as passes count them: its self-attentions in the order they run.

One attention node in the body of a loop is one layer for each trip. An argument that differs from
layer to layer is an input of the loop with one value per trip.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from reroll.rewrite.analysis.state_plan import behind_cache
from reroll.rewrite.capture.raising.attention import attention_arguments, set_arguments
from reroll.rewrite.ir.matching import argument, shape
from reroll.rewrite.ir.ops import ATTENTION
from reroll.rewrite.ir.program import Loop, Program


@dataclass(frozen=True)
class AttentionLayer:
    """Attention node with the numbers of its layers, one per trip of its loop."""

    node: fx.Node
    loop: Loop | None
    numbers: tuple[int, ...]

    def values(self, name: str) -> tuple[Any, ...]:
        """Return an argument of the attention in each of the layers."""
        return values_of(argument(self.node, name), self.loop, len(self.numbers))

    def set(self, name: str, values: Mapping[int, Any]) -> None:
        """Set an argument to a constant in each given layer; other layers keep their values."""
        old = self.values(name)
        new = [values.get(n, o) for n, o in zip(self.numbers, old, strict=True)]
        arguments = attention_arguments(self.node)
        arguments[name] = per_trip(self.loop, name, new)
        set_arguments(self.node, arguments)
        if self.loop is not None:
            self.loop.drop_unused_inputs()


def attention_layers(program: Program) -> list[AttentionLayer]:
    """Find the self-attentions of a Program; cross-attention is excluded."""
    attentions: list[tuple[fx.Node, Loop | None, list[int]]] = []
    loops = {loop.node: loop for loop in program.loops}
    count = 0
    for node in program.graph.nodes:
        if is_self_attention(node):
            attentions.append((node, None, [count]))
            count += 1
        elif node in loops:
            loop = loops[node]
            inner = [n for n in loop.body.graph.nodes if is_self_attention(n)]
            rows: list[list[int]] = [[] for _ in inner]
            for _ in range(loop.trips):
                for row in rows:
                    row.append(count)
                    count += 1
            attentions += [(n, loop, row) for n, row in zip(inner, rows, strict=True)]
    return [AttentionLayer(node, loop, tuple(numbers)) for node, loop, numbers in attentions]


def is_self_attention(node: fx.Node) -> bool:
    """Whether a node is an attention whose keys are those of its own tokens."""
    if node.op != "call_function" or node.target is not ATTENTION:
        return False
    q, k = shape(argument(node, "q")), shape(argument(node, "k"))
    # with a cache there are more keys than queries, and only the cache node tells whose they are
    return q[2:3] == k[2:3] or behind_cache(argument(node, "k")) is not None


# ---- what differs from trip to trip


def values_of(value: Any, loop: Loop | None, trips: int) -> tuple[Any, ...]:
    """Return the value of an argument in each trip; only inputs of the loop can differ."""
    if loop is None:
        return (value,) * trips
    return tuple(loop.resolve(value, trip) for trip in range(trips))


def per_trip(loop: Loop | None, name: str, values: Sequence[Any]) -> Any:
    """Return one argument for all trips: the value if it never differs, else an input of the loop.

    The result goes into the graph of the body.
    """
    if all(value == values[0] and type(value) is type(values[0]) for value in values):
        return values[0]
    assert loop is not None
    for position, old in enumerate(loop.inputs):
        if isinstance(old, tuple) and old == tuple(values):
            return loop.places[len(loop.carry) + position]
    return loop.add_input(name, tuple(values))
