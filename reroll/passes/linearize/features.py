"""Feature maps that `linearize` applies to queries and keys before a mixer reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from reroll.passes.linearize.linearized_attention import LinearizedAttention
from reroll.rewrite.ir.builder import Builder
from reroll.rewrite.ir.weights import Expr, build
from reroll.rewrite.ir.weights.expressions import DTYPE_NAMES, Meta, dtype_from_name
from reroll.rewrite.ir.weights.registry import weight_function

Feature = Literal["none", "softmax", "elu", "relu", "hedgehog"]


def _softmax(x: Tensor) -> Tensor:
    return F.softmax(x, dim=-1, dtype=torch.float32).to(x.dtype)


def _hedgehog(x: Tensor, weight: Tensor) -> Tensor:
    """Compute [softmax(x W); softmax(-x W)] per head (Zhang et al., 2024, arXiv 2402.04347)."""
    turned = torch.matmul(x, weight)
    return torch.cat((_softmax(turned), _softmax(-turned)), dim=-1)


_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": _softmax,
    "elu": lambda x: F.elu(x) + 1,
    "relu": F.relu,
}


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
    if feature != "hedgehog":
        return Builder(attention.graph).trace(_PLAIN[feature], x)
    type_ = x.meta["type"]
    heads, size = int(type_.shape[1]), int(type_.shape[3])

    def start(layer: int) -> Expr:
        del layer
        return build("identities", heads, size, DTYPE_NAMES[type_.dtype])

    weight = attention.new_weight(f"{name}_features", (heads, size, size), start)
    return Builder(attention.graph).trace(_hedgehog, x, weight)
