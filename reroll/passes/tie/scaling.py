"""Scale the outputs of a loop body by the step, so that a block can act differently per trip."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from reroll.errors import PassError
from reroll.rewrite.analysis.residual import Tracer
from reroll.rewrite.ir.builder import Builder
from reroll.rewrite.ir.patterns import Miss
from reroll.rewrite.ir.program import Loop, Program
from reroll.rewrite.ir.records import TensorType
from reroll.rewrite.ir.weights import Weight, normal, zeros

aten = torch.ops.aten

INNER = 16


def scale_by_step(program: Program, loop: Loop, index: Sequence[int]) -> tuple[Program, int]:
    """Multiply the outputs of the sublayers and of the trip by 1 + MLP(step); edits in place.

    The MLP of Raptor (arXiv 2512.19941) maps the step t in [0, 1] of a block's trips: Linear(1, 16)
    -> SiLU -> Linear(16, width) for each scaled output. Trips with the same number in `index` share
    a block and its MLP. The last layer starts as zero, so that nothing changes before training.
    Returns the Program and the number of new parameters.

    Raises PassError if the residual stream of the body cannot be followed.
    """
    body = loop.body.graph
    places = loop.places
    stream = Tracer(program).trace(places[0])
    if isinstance(stream, Miss):
        raise PassError(
            f"the residual stream cannot be followed: {stream.reason}",
            ", ".join(stream.nodes),
        )
    returned: Any = body.output_node().args[0]
    result: fx.Node = returned[0]
    written = [n for n in body.nodes if n in stream.writers]
    type_: TensorType = result.meta["type"]
    width = type_.shape[-1]
    assert isinstance(width, int)
    count = len(written) + 1
    step = loop.add_input("step", _steps(index))
    blocks = range(max(index) + 1)
    shapes = {
        "up.weight": (INNER, 1), "up.bias": (INNER,),
        "down.weight": (count * width, INNER), "down.bias": (count * width,),
    }  # fmt: skip
    weights: dict[str, Weight] = {}
    nodes: dict[str, fx.Node] = {}
    build = Builder(body, loop)
    with build.before(next(n for n in body.nodes if n.op != "placeholder")):
        for name, shape in shapes.items():
            entries = tuple(
                normal(shape, 1.0, block, type_.dtype)
                if name.startswith("up")
                else zeros(shape, type_.dtype)
                for block in blocks
            )
            full = f"{loop.name}.*.step.{name}"
            weights[full] = Weight(entries, tuple(index))
            nodes[name] = build.weight(full, weights[full])
        h = build.call(aten.full.default, [1], step, dtype=type_.dtype)
        h = build.call(aten.linear.default, h, nodes["up.weight"], nodes["up.bias"])
        h = build.call(aten.silu.default, h)
        h = build.call(aten.linear.default, h, nodes["down.weight"], nodes["down.bias"])
        out = build.call(aten.add.Tensor, h, 1.0)
        scales = [
            build.call(aten.slice.Tensor, out, 0, n * width, (n + 1) * width) for n in range(count)
        ]
    for node, scale in zip([*written, result], scales, strict=True):
        build.wrap(node, _times(build, scale))
    added = sum(weight.elements() for weight in weights.values())
    return replace(program, weights=program.weights.with_weights(weights)), added


def _times(build: Builder, scale: fx.Node) -> Callable[[fx.Node], fx.Node]:
    return lambda node: build.call(aten.mul.Tensor, node, scale)


def _steps(index: Sequence[int]) -> tuple[float, ...]:
    """Return the position of each trip among those of its block, from 0 to 1."""
    uses = [[t for t, b in enumerate(index) if b == block] for block in range(max(index) + 1)]
    return tuple(
        uses[block].index(trip) / max(len(uses[block]) - 1, 1) for trip, block in enumerate(index)
    )
