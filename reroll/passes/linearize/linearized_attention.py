"""Describe an attention that a mixer can replace: queries, keys, values and projections."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from reroll.errors import PassError
from reroll.rewrite.analysis.layers import AttentionLayer
from reroll.rewrite.analysis.state_plan import before_cache, behind_cache
from reroll.rewrite.ir.builder import Builder
from reroll.rewrite.ir.matching import argument, shape
from reroll.rewrite.ir.ops import ROPE
from reroll.rewrite.ir.patterns import Miss
from reroll.rewrite.ir.records import TensorType
from reroll.rewrite.ir.weight_edit import WeightEditor
from reroll.rewrite.ir.weights import Expr, Weight

LINEAR = torch.ops.aten.linear.default


@dataclass
class LinearizedAttention:
    """An attention and the layers of it that are to be linearized.

    Attributes:
        layer: the attention.
        chosen: numbers of the layers that get a mixer; the others of its loop stay as they are.
        edit: the Program's weights, to which an attention adds its own.
        q: queries [batch, heads, time, d_k] as the attention reads them.
        k: keys [batch, kv_heads, time, d_k] of the new tokens alone.
        v: values [batch, kv_heads, time, d_v] likewise.
    """

    layer: AttentionLayer
    chosen: tuple[int, ...]
    edit: WeightEditor
    q: fx.Node
    k: fx.Node
    v: fx.Node
    # the name of the weight that holds its gains, once there is one
    gain: str | None = None
    # the node of the attention's softmax divisor, once there is one
    mass: fx.Node | None = None

    @property
    def node(self) -> fx.Node:
        """Node of the attention."""
        return self.layer.node

    @property
    def graph(self) -> fx.Graph:
        """Graph that holds the attention."""
        return self.node.graph

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return int(shape(self.q)[1])

    @property
    def kv_heads(self) -> int:
        """Number of key-value heads."""
        return int(shape(self.k)[1])

    @property
    def d_k(self) -> int:
        """Size of a query and key."""
        return int(shape(self.q)[3])

    @property
    def d_v(self) -> int:
        """Size of a value."""
        return int(shape(self.v)[3])

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the values."""
        type_: TensorType = self.v.meta["type"]
        return type_.dtype

    @property
    def causal(self) -> bool:
        """Whether the attention is causal."""
        return bool(self.layer.values("causal")[0])

    @property
    def active(self) -> list[bool]:
        """Whether the layer of each trip is chosen, by trip."""
        return [n in self.chosen for n in self.layer.numbers]

    def after(self, node: fx.Node, target: Any, args: tuple[Any, ...]) -> fx.Node:
        """Insert a new node after another one."""
        build = Builder(self.graph, self.layer.loop)
        with build.after(node):
            return build.call(target, *args)

    def projection(self) -> fx.Node:
        """Find the linear layer that computes the keys. Raises PassError if there is none."""
        visited, front = {self.k}, [self.k]
        while front:
            node = front.pop(0)
            if node.target is LINEAR:
                return node
            new = [n for n in node.all_input_nodes if n not in visited and n.op == "call_function"]
            visited.update(new)
            front += new
        raise PassError(
            "no linear layer computes the keys",
            where=self.node.name,
            hint="choose gates that need no key projection, such as liger",
        )

    def new_weight(
        self, name: str, meta_shape: tuple[int, ...], make: Callable[[int], Expr]
    ) -> fx.Node:
        """Add a weight next to those of the attention, with an entry for each chosen layer.

        `make` gives the entry of a layer's number. Layers that are not chosen share the entry of a
        chosen one, and do not use it.
        """
        full = self.edit.free_name(f"{self._stem()}mixer.{name}")
        entries = [make(number) for number in self.chosen]
        index = None
        if self.layer.loop is not None:
            index, last = [], 0
            for number in self.layer.numbers:
                last = self.chosen.index(number) if number in self.chosen else last
                index.append(last)
        weight = Weight(tuple(entries), None if index is None else tuple(index))
        assert weight.meta.shape == meta_shape
        self.edit.weights = self.edit.weights.with_weight(full, weight)
        return self.edit.node(self.graph, full)

    def _stem(self) -> str:
        """Return the prefix of the names of the attention's weights."""
        try:
            name = str(self.projection().args[1].target)  # type: ignore[union-attr]
        except PassError:
            return f"{self.node.name}."
        return name.removesuffix(".weight").rpartition(".")[0] + "."


def linearized_attention(
    layer: AttentionLayer, chosen: tuple[int, ...], edit: WeightEditor
) -> LinearizedAttention | Miss:
    """Return an attention to be linearized, or the reason why a mixer cannot replace it."""
    node = layer.node
    if len(set(layer.values("causal"))) > 1:
        return Miss("the attention is causal in some trips only", (node.name,))
    for name in ("blocks", "chunk"):
        if any(value is not None for value in layer.values(name)):
            return Miss(f"the attention has {name}", (node.name,), depth=1)
    q, k, v = (argument(node, name) for name in ("q", "k", "v"))
    if (cache := behind_cache(k)) is not None:
        if behind_cache(v) is not cache:
            return Miss("keys and values are read from different caches", (node.name,), depth=1)
        k, v = before_cache(k), before_cache(v)
    if shape(k)[2:3] != shape(q)[2:3]:
        return Miss(
            "the keys belong to other tokens than the queries, as in cross-attention",
            (node.name,),
            depth=2,
        )
    return LinearizedAttention(layer, chosen, edit, q, k, v)


def before_rotary(x: fx.Node) -> fx.Node:
    """Return queries or keys before their rotary embedding; the same node if there is none."""
    source = x.args[0] if x.target is ROPE else x
    assert isinstance(source, fx.Node)
    return source
