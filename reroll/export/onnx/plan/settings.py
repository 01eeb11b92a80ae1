"""Settings of an export, and the dtypes that follow from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.records import Dim

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
