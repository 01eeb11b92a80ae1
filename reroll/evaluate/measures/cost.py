"""Count what one more token costs: operations, bytes that are read, state; nothing is timed.

Operations are those of matrix products and attention, two for a multiply-add. Bytes read are the
state and the weights of a token's forward. A weight counts once for each trip that uses it, and an
embedding table counts one row. At batch size 1, decoding is bound by them. `weight_bytes` are those
of the weights as stored. Where they fit into a cache, weights that trips share are read from memory
once only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import fx

from reroll.bounds import COUNT
from reroll.evaluate.measure import Bench, Measure, NotApplicable
from reroll.evaluate.runner import Runner
from reroll.rewrite.analysis.costs import flops_per_token
from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.types import type_of
from reroll.rewrite.pipeline.options import option

EMBEDDING = torch.ops.aten.embedding.default


class Cost(Measure):
    """Parameters, operations and bytes for one more token, over the context."""

    name = "cost"
    full: ClassVar[Mapping[str, Any]] = {"contexts": [128, 1024, 4096, 16384, 65536]}

    contexts: list[int] = option([1024, 4096], within=COUNT, help="tokens in context")

    def run(self, bench: Bench) -> dict[str, Any]:
        return {side: self._of(runner) for side, runner in bench.sides.items()}

    def headline(self, result: Mapping[str, Any]) -> dict[str, float | int | None]:
        rows: dict[str, float | int | None] = {
            "parameters": result["parameters"],
            "weights (bytes)": result["weight_bytes"],
            "weights read for a token (bytes)": result["weight_bytes_read"],
        }
        for at in result["contexts"]:
            rows[f"FLOPs for a token at {at['context']:,}"] = at["flops_per_token"]
            rows[f"state at {at['context']:,} (bytes)"] = at["state_bytes"]
        return rows

    def _of(self, runner: Runner) -> dict[str, Any]:
        subject = runner.subject
        program = subject.program
        if program is None:
            raise NotApplicable(f"{runner.name} could not be captured, so nothing can be counted")
        read = bytes_read(program)
        contexts = [
            {
                "context": context,
                "flops_per_token": flops_per_token(program, context),
                "state_bytes": (state := subject.state_bytes(context)),
                "bytes_per_token": read + (state or 0),
            }
            for context in self.contexts
        ]
        return {
            "parameters": subject.parameters(),
            "weight_bytes": subject.bytes(),
            "weight_bytes_read": read,
            "contexts": contexts,
        }


def bytes_read(program: Program) -> int:
    """Count the bytes of the weights that the forward of one token reads, trip by trip."""
    loops = sum(loop.trips * _graph(loop.body.graph) for loop in program.loops)
    return _graph(program.graph) + loops


def _graph(graph: fx.Graph) -> int:
    total = 0
    for node in graph.nodes:
        type_ = type_of(node)
        if node.op != "get_attr" or type_ is None:
            continue
        sizes = [int(size) for size in type_.shape]
        size = type_.dtype.itemsize * math.prod(sizes)
        tables = [u for u in node.users if u.target is EMBEDDING and u.args[0] is node]
        # a table that is tied to the head is read whole there
        if tables and len(tables) == len(node.users):
            size //= sizes[0]
        total += size
    return total
