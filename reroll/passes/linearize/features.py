"""Feature maps that `linearize` applies to queries and keys before a mixer reads them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, fx

from reroll.mixers.feature_maps import FEATURE_MAPS
from reroll.passes.linearize.linearized_attention import LinearizedAttention
from reroll.rewrite.ir.builder import Builder
from reroll.rewrite.ir.weights import Expr, build
from reroll.rewrite.ir.weights.expressions import DTYPE_NAMES, Meta, dtype_from_name
from reroll.rewrite.ir.weights.registry import weight_function

Feature = Literal["none", "softmax", "elu", "relu", "hedgehog"]


@weight_function(
    lambda count, size, dtype: Meta((count, size, size), dtype_from_name(dtype)), arithmetic=False
)
def identities(count: int, size: int, dtype: str) -> Tensor:
    """Return `count` identity matrices, [count, size, size]."""
    return torch.eye(size, dtype=dtype_from_name(dtype)).repeat(count, 1, 1)


def mapped(attention: LinearizedAttention, x: fx.Node, feature: Feature, name: str) -> fx.Node:
    """Apply a feature map to queries or keys [batch, heads, time, size]; `name` is "q" or "k"."""
    if feature == "none":
        return x
    features = FEATURE_MAPS[feature]
    builder = Builder(attention.graph)
    if feature != "hedgehog":
        return builder.trace(lambda x: features(x).to(x.dtype), x)
    type_ = x.meta["type"]
    heads, size = int(type_.shape[1]), int(type_.shape[3])

    def start(layer: int) -> Expr:
        del layer
        return build("identities", heads, size, DTYPE_NAMES[type_.dtype])

    # the paper's projection, per head
    weight = attention.new_weight(f"{name}_features", (heads, size, size), start)
    return builder.trace(lambda x, w: features(torch.matmul(x, w)).to(x.dtype), x, weight)
