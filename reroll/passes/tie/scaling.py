"""Scaling what a body writes by the step that it is in: how one block tells its trips apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from reroll.errors import PassError
from reroll.rewrite.analysis.residual import Tracer
from reroll.rewrite.ir.patterns import Miss
from reroll.rewrite.ir.program import Loop, Program, TensorType
from reroll.rewrite.ir.weights import Weight, normal, zeros

aten = torch.ops.aten

INNER = 16


def scale_by_step(program: Program, loop: Loop, index: Sequence[int]) -> tuple[Program, int]:
    """Multiply what each sublayer writes, and the result, by 1 + MLP(step); edits in place.

    The MLP of Raptor (arXiv 2512.19941): the step t in [0, 1] of a block's trips -> Linear(1, 16)
    -> SiLU -> Linear(16, width) for each of them. Trips with the same number in `index` are those
    of one block, and share it. Its last layer starts as zero, so that nothing changes before
    training. Returns the Program and the number of new parameters.

    Raises PassError if the residual stream of the body cannot be followed.
    """
    body = loop.body.graph
    places = loop.places
    stream = Tracer(program).trace(places[0])
    if isinstance(stream, Miss):
        raise PassError(
            f"what the sublayers write cannot be told: {stream.reason}", ", ".join(stream.nodes)
        )
    returned: Any = body.output_node().args[0]
    result: fx.Node = returned[0]
    written = [n for n in body.nodes if n in stream.writers]
    kind: TensorType = result.meta["type"]
    width = kind.shape[-1]
    assert isinstance(width, int)
    count = len(written) + 1
    with body.inserting_after(places[-1]):
        step = body.placeholder("step")
    blocks = range(max(index) + 1)
    shapes = {
        "up.weight": (INNER, 1), "up.bias": (INNER,),
        "down.weight": (count * width, INNER), "down.bias": (count * width,),
    }  # fmt: skip
    weights: dict[str, Weight] = {}
    nodes: dict[str, fx.Node] = {}
    scales: list[fx.Node] = []
    first = next(n for n in body.nodes if n.op != "placeholder")
    with body.inserting_before(first):
        for name, shape in shapes.items():
            entries = tuple(
                normal(shape, 1.0, block, kind.dtype)
                if name.startswith("up")
                else zeros(shape, kind.dtype)
                for block in blocks
            )
            full = f"{loop.name}.*.step.{name}"
            weights[full] = Weight(entries, tuple(index))
            nodes[name] = body.get_attr(full)
            nodes[name].meta["type"] = TensorType(kind.dtype, shape)

        def call(target: object, args: tuple[object, ...], size: int, **kwargs: object) -> fx.Node:
            node = body.call_function(target, args, kwargs)  # type: ignore[arg-type]
            node.meta["type"] = TensorType(kind.dtype, (size,))
            return node

        t = call(aten.full.default, ([1], step), 1, dtype=kind.dtype)
        h = call(aten.linear.default, (t, nodes["up.weight"], nodes["up.bias"]), INNER)
        h = call(aten.silu.default, (h,), INNER)
        out = call(
            aten.linear.default, (h, nodes["down.weight"], nodes["down.bias"]), count * width
        )
        out = call(aten.add.Tensor, (out, 1.0), count * width)
        for number in range(count):
            start = number * width
            scales.append(call(aten.slice.Tensor, (out, 0, start, start + width), width))
    for node, scale in zip([*written, result], scales, strict=True):
        with body.inserting_after(node):
            scaled = body.call_function(aten.mul.Tensor, (node, scale))
        scaled.meta["type"] = node.meta["type"]
        node.replace_all_uses_with(scaled)
        scaled.replace_input_with(scaled, node)
    loop.node.args = (loop.name, loop.carry, (*loop.inputs, _steps(index)), loop.trips)
    added = sum(weight.elements() for weight in weights.values())
    return replace(program, weights=program.weights.with_weights(weights)), added


def _steps(index: Sequence[int]) -> tuple[float, ...]:
    """Where each trip is among those of its block, from 0 to 1."""
    uses = [[t for t, b in enumerate(index) if b == block] for block in range(max(index) + 1)]
    return tuple(
        uses[block].index(trip) / max(len(uses[block]) - 1, 1) for trip, block in enumerate(index)
    )
