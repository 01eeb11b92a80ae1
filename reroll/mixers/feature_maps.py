"""Feature maps, with which linear attention replaces the exponential of a score.

Each is a function of the last dimension without parameters. Where a paper learns a projection
before it (Hedgehog, T2R), that projection is an ordinary operation of the program.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from reroll.mixers.gates import wide

Name = Literal["none", "elu", "relu", "softmax", "hedgehog", "taylor"]


@dataclass(frozen=True)
class FeatureMap:
    """A map from `d` channels to `size(d)` features."""

    function: Callable[[Tensor], Tensor]
    size: Callable[[int], int]

    def __call__(self, x: Tensor) -> Tensor:
        """Compute the features of `x`, in fp32."""
        return self.function(wide(x))


def _hedgehog(x: Tensor) -> Tensor:
    # the floor of the paper's code, so that no feature is zero
    return torch.cat([x.softmax(-1), (-x).softmax(-1)], -1).clamp(min=1e-12)


def _taylor(x: Tensor) -> Tensor:
    x = x / x.shape[-1] ** 0.25
    square = (x[..., :, None] * x[..., None, :]).flatten(-2) / math.sqrt(2)
    return torch.cat([torch.ones_like(x[..., :1]), x, square], -1)


FEATURE_MAPS: dict[str, FeatureMap] = {
    "none": FeatureMap(lambda x: x, lambda d: d),
    # Katharopoulos et al., 2020 (arXiv 2006.16236), equation 7
    "elu": FeatureMap(lambda x: F.elu(x) + 1, lambda d: d),
    # T2R, Kasai et al., 2021 (arXiv 2103.13076), equation 3
    "relu": FeatureMap(torch.relu, lambda d: d),
    # Liger, Lan et al., 2025 (arXiv 2503.01496): over the channels of a head
    "softmax": FeatureMap(lambda x: x.softmax(-1), lambda d: d),
    # Zhang et al., 2024 (arXiv 2402.04347), in the form with a softmax
    "hedgehog": FeatureMap(_hedgehog, lambda d: 2 * d),
    # Based, Arora et al., 2024 (arXiv 2402.18668): exp(q . k / sqrt(d)) to the second order
    "taylor": FeatureMap(_taylor, lambda d: 1 + d + d * d),
}
