"""Feature maps: what queries and keys go through before a mixer multiplies them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from reroll.passes.linearization.codebook import SIDES, Codebook, Side
from reroll.passes.linearization.sites import Site
from reroll.rewrite.inserting import insert
from reroll.rewrite.weights import Expr, Source, build, cast
from reroll.rewrite.weights.expressions import DTYPE_NAMES, Meta, dtype_from_name, meta_of
from reroll.rewrite.weights.registry import weight_function

Feature = Literal["none", "softmax", "elu", "relu", "hedgehog", "codebook"]


def _softmax(x: Tensor) -> Tensor:
    return F.softmax(x, dim=-1, dtype=torch.float32).to(x.dtype)


def _codebook(x: Tensor, weight: Tensor) -> Tensor:
    """softmax(x W) for each head: how near to each bucket."""
    return _softmax(torch.matmul(x, weight))


def _hedgehog(x: Tensor, weight: Tensor) -> Tensor:
    """[softmax(x W); softmax(-x W)] for each head (Zhang et al., 2024, arXiv 2402.04347)."""
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
    """As many identity matrices [count, size, size]."""
    return torch.eye(size, dtype=dtype_from_name(dtype)).repeat(count, 1, 1)


def mapped(
    site: Site,
    x: fx.Node,
    feature: Feature,
    name: Side,
    codebooks: Mapping[int, Codebook],
) -> fx.Node:
    """Queries or keys [batch, heads, time, size] after a feature map."""
    if feature == "none":
        return x
    if feature not in ("hedgehog", "codebook"):
        return insert(site.graph, _PLAIN[feature], [x])
    kind = x.meta["type"]
    heads, size = int(kind.shape[1]), int(kind.shape[3])
    if feature == "hedgehog":

        def start(layer: int) -> Expr:
            del layer
            return build("identities", heads, size, DTYPE_NAMES[kind.dtype])

        weight = site.new_weight(f"{name}_features", (heads, size, size), start)
        return insert(site.graph, _hedgehog, [x, weight])

    def measured(layer: int) -> Expr:
        tensor = codebooks[layer].part(name)
        return cast(Source(codebook_name(layer, name), meta_of(tensor)), kind.dtype)

    buckets = codebooks[site.chosen[0]].size
    weight = site.new_weight(f"{name}_features", (heads, size, buckets), measured)
    return insert(site.graph, _codebook, [x, weight])


def codebook_tensors(codebooks: Mapping[int, Codebook]) -> dict[str, Tensor]:
    """The codebooks of layers by the names that their weights are read by."""
    return {codebook_name(n, name): c.part(name) for n, c in codebooks.items() for name in SIDES}


def codebook_name(layer: int, name: Side) -> str:
    """What a tensor of a layer's codebook is called in the Program's source."""
    return f"linearize.codebook.{layer}.{name}"
