"""Nodes of a body under construction, each with the type of what it computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from reroll.rewrite.ir.dtypes import WIDEN
from reroll.rewrite.ir.program import Dim, TensorType

aten = torch.ops.aten


class Nodes:
    """A graph to which typed nodes are added; `tokens` are the first dimensions of all values."""

    def __init__(self, graph: fx.Graph, tokens: tuple[Dim, ...]) -> None:
        self.graph, self.tokens = graph, tokens

    def place(self, name: str, kind: TensorType) -> fx.Node:
        """A placeholder."""
        node = self.graph.placeholder(name)
        node.meta["type"] = kind
        return node

    def call(self, target: Any, args: tuple[Any, ...], kind: TensorType | None) -> fx.Node:
        """A call of an op."""
        node = self.graph.call_function(target, args)
        if kind is not None:
            node.meta["type"] = kind
        return node

    def per_token(self, dtype: torch.dtype) -> TensorType:
        """The type of one number for each token."""
        return TensorType(dtype, self.tokens)

    def wide(self, node: fx.Node) -> fx.Node:
        """A value in fp32, also where the Program is narrowed later."""
        kind = node.meta["type"]
        if kind.dtype == torch.float32:
            return node if node.target is WIDEN else self.call(WIDEN, (node,), kind)
        wide = TensorType(torch.float32, kind.shape)
        return self.call(aten.to.dtype, (node, torch.float32), wide)
