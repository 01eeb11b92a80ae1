"""Find linear layers that are one kernel with adjacent operations, for few rows.

An RMS norm before, a low-rank residual (as `relax` makes it) and a gated linear unit behind would
be separate launches in a decoding step. `kernels.linear_rows` computes a layer with all of them.
Layers without any of these are left to PyTorch, and so are all layers when there are more rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from reroll.kernels.linear_rows import ACTIVATIONS
from reroll.rewrite.analysis.low_rank import low_rank_term
from reroll.rewrite.ir.matching import argument
from reroll.rewrite.ir.ops import GLU, RMS_NORM
from reroll.rewrite.ir.program import Program

LINEAR = torch.ops.aten.linear.default
# the largest rank of a low-rank residual, which the kernel keeps in registers
LARGEST_RANK = 64


@dataclass(frozen=True)
class Layer:
    """A linear layer: its input, and the nodes of weight, bias, down and up, which may be None.

    `nodes` are the nodes of the layer, its result last.
    """

    source: fx.Node
    weights: tuple[fx.Node | None, ...]
    nodes: tuple[fx.Node, ...]

    @property
    def rank(self) -> int:
        """Rank of the low-rank residual; 0 without one."""
        return 0 if self.weights[2] is None else int(_shape(self.weights[2])[0])

    @property
    def kind(self) -> tuple[Any, ...]:
        """Properties that both layers of a gated unit must share."""
        return self.source, _shape(self.weights[0]), self.weights[1] is None, self.rank


@dataclass(frozen=True)
class Fused:
    """A node that one kernel computes: a layer, or two layers and the unit that they gate.

    `norm` is the norm before it, if the kernel computes that too; then it is not computed
    elsewhere.
    """

    layers: tuple[Layer, ...]
    activation: str = ""
    norm: fx.Node | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """Inputs, rank, norm, gain, bias and activation, to which its kernel is specialised."""
        first = self.layers[0]
        gain = self.norm is not None and argument(self.norm, "weight") is not None
        return (
            _shape(first.weights[0])[1], first.rank, self.norm is not None, gain,
            first.weights[1] is not None, self.activation,
        )  # fmt: skip


def fused_of(program: Program) -> dict[fx.Node, Fused]:
    """Find the fused layers of a program's graphs, in order.

    There are none in fp16, whose range a kernel may exceed.
    """
    found: dict[fx.Node, Fused] = {}
    if program.dtype not in (torch.float32, torch.bfloat16):
        return found
    for _, graph in program.graphs():
        found |= _in_graph(graph)
    return found


def kinds_of(fused: Sequence[Fused]) -> list[Fused]:
    """Return one fused layer for each kernel, in the order of first use."""
    return list({f.key: f for f in reversed(fused)}.values())[::-1]


def _in_graph(graph: fx.Graph) -> dict[fx.Node, Fused]:
    layers = {node: layer for node in graph.nodes if (layer := _layer(node)) is not None}
    inside = {n for layer in layers.values() for n in layer.nodes[:-1]}
    found = {node: Fused((layer,)) for node, layer in layers.items() if node not in inside}
    for node in graph.nodes:
        gated = _gated(node, layers)
        if gated is not None:
            for layer in gated.layers:
                del found[layer.nodes[-1]]
            found[node] = gated
    ours = {n for f in found.values() for layer in f.layers for n in layer.nodes}
    for node, fused in found.items():
        # the norm before it, if only fused layers read that
        source = fused.layers[0].source
        if source.target is RMS_NORM and all(user in ours for user in source.users):
            found[node] = replace(fused, norm=source)
    return {
        node: found[node] for node in graph.nodes
        if node in found and (found[node].norm or found[node].activation or found[node].key[1])
    }  # fmt: skip


def _gated(node: fx.Node, layers: dict[fx.Node, Layer]) -> Fused | None:
    if node.target is not GLU:
        return None
    gate, up, activation = (argument(node, n) for n in ("gate", "up", "activation"))
    pair = [layers.get(half) for half in (gate, up)]
    alone = len(gate.users) == len(up.users) == 1 and gate is not up
    if activation not in ACTIVATIONS or None in pair or not alone:
        return None
    first, second = pair
    assert first is not None
    assert second is not None
    return Fused((first, second), activation) if first.kind == second.kind else None


def _layer(node: fx.Node) -> Layer | None:
    """Match a linear layer, or the sum of one and of a low-rank residual of the same input."""
    if node.target is LINEAR:
        source, *weights = (argument(node, n) for n in ("input", "weight", "bias"))
        if not all(w is None or w.op == "get_attr" for w in weights):
            return None
        return Layer(source, (*weights, None, None), (node,))
    term = low_rank_term(node)
    if term is None or term.base is not term.whole:
        return None
    nodes = (term.down, term.up, term.whole, node)
    layer = _layer(term.whole)
    if layer is None or any(len(n.users) != 1 for n in nodes[:3]):
        return None
    parts = [argument(n, "weight") for n in nodes[:2]]
    if _shape(parts[0])[0] > LARGEST_RANK:
        return None
    return Layer(layer.source, (*layer.weights[:2], *parts), nodes)


def _shape(node: Any) -> tuple[int, ...]:
    shape: tuple[int, ...] = tuple(node.meta["type"].shape)
    return shape
