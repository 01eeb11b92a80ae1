"""Small Programs made by hand, for tests that do not need a captured model."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from reroll.rewrite.checkpoint import MemorySource
from reroll.rewrite.ir import ops
from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.records import Body, Input, Origin, Step, TensorType
from reroll.rewrite.ir.weights import Weight, WeightTable
from reroll.rewrite.ir.weights.expressions import Meta, Source

F32, I64 = torch.float32, torch.int64
aten, reroll = torch.ops.aten, torch.ops.reroll
WIDTH, WORDS = 8, 16


def typed(node: fx.Node, *shape: int | str, dtype: torch.dtype = F32) -> fx.Node:
    """The node, after giving it a type."""
    node.meta["type"] = TensorType(dtype, shape)
    return node


def call(graph: fx.Graph, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A node that calls a function."""
    return graph.call_function(target, args, kwargs)


def stack(name: str, trips: int, *shape: int) -> Weight:
    """A stacked weight with one checkpoint tensor per trip."""
    entries = (Source(name.replace("*", str(i)), Meta(shape, F32)) for i in range(trips))
    return Weight(tuple(entries), tuple(range(trips)))


def replaced(program: Program, **changes: Any) -> Program:
    """A copy whose graphs may be edited, with some of its fields replaced."""
    return replace(program.edit(), **changes)


def layer() -> fx.Graph:
    """One trip: a norm, a projection, a clamp with a per-trip bound, and a residual."""
    graph = fx.Graph()
    h = typed(graph.placeholder("h"), "b", "s", WIDTH)
    bound = graph.placeholder("bound")
    norm = graph.get_attr("layers.*.norm.weight")
    x = typed(call(graph, reroll.rms_norm.default, h, norm, 1e-5), "b", "s", WIDTH)
    weight = graph.get_attr("layers.*.proj.weight")
    x = typed(call(graph, aten.linear.default, x, weight), "b", "s", WIDTH)
    x = typed(call(graph, aten.clamp.default, x, max=bound), "b", "s", WIDTH)
    graph.output((typed(call(graph, aten.add.Tensor, h, x), "b", "s", WIDTH),))
    return graph


def tiny(trips: int = 3) -> Program:
    """An embedding, a loop of `layer`, and a head that is tied to the embedding."""
    generator = torch.Generator().manual_seed(0)
    tensors = {"embed.weight": torch.randn(WORDS, WIDTH, generator=generator)}
    for i in range(trips):
        tensors[f"layers.{i}.norm.weight"] = torch.randn(WIDTH, generator=generator)
        tensors[f"layers.{i}.proj.weight"] = torch.randn(WIDTH, WIDTH, generator=generator)
    graph = fx.Graph()
    ids = typed(graph.placeholder("input_ids"), "b", "s", dtype=I64)
    embed = graph.get_attr("embed.weight")
    h = typed(call(graph, aten.embedding.default, embed, ids), "b", "s", WIDTH)
    bounds = (None, *(0.5 * i for i in range(1, trips)))
    loop = call(graph, ops.loop, "layers", (h,), (bounds,), trips)
    h = typed(call(graph, operator.getitem, loop, 0), "b", "s", WIDTH)
    logits = typed(call(graph, aten.linear.default, h, embed), "b", "s", WORDS)
    graph.output((logits,))
    weights = {
        "embed.weight": Weight((Source("embed.weight", Meta((WORDS, WIDTH), F32)),)),
        "layers.*.norm.weight": stack("layers.*.norm.weight", trips, WIDTH),
        "layers.*.proj.weight": stack("layers.*.proj.weight", trips, WIDTH, WIDTH),
    }
    return Program(
        graph=graph,
        bodies={"layers": Body(layer())},
        weights=WeightTable(weights),
        source=MemorySource(tensors),
        inputs=(Input("input_ids", TensorType(I64, ("b", "s"))),),
        outputs=("logits",),
        dtype=F32,
        origin=Origin(
            model="tiny",
            architecture="TinyForCausalLM",
            auto_class="AutoModelForCausalLM",
            config={"layers": trips, "tied": True},
            steps=(Step("tie(blocks=1)", 0.5, ("tied 3 layers",), {"kl": 0.25}),),
        ),
    )
