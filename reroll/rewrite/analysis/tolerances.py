"""Tolerances for two computations of the same value: relative RMS error, per dtype."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# |a - b| / |b| of a computation and its reference
FORWARD: dict[torch.dtype, float] = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 5e-3,
}
GRADIENT = 8e-3
# Triton in fp32 without TF32 adds up in another order
FORWARD_TRITON_FP32 = 1e-4
# raising and rolling reorder no arithmetic, so only rounding inside single ops differs
ROLLED: dict[torch.dtype, float] = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 5e-3,
}


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """Compute the RMS of the difference divided by that of `expected`; inf if not finite.

    Elements that are equal in both, infinities included, count as no difference.
    """
    if actual.shape != expected.shape:
        return float("inf")
    difference = scale = 0.0
    # in pieces, because logits in fp64 are large
    pieces = (torch.split(t.detach().flatten(), _PIECE) for t in (actual, expected))
    for a, b in zip(*pieces, strict=True):
        error, size = _squares(a.double(), b.double())
        difference, scale = difference + error, scale + size
    if not math.isfinite(difference):
        return float("inf")
    if scale == 0.0:
        return float("inf") if difference else 0.0
    return math.sqrt(difference / scale)


_PIECE = 2**20


def _squares(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Return the sums of the squares of a - b and of b; equal non-finite elements are left out."""
    error, size = (a - b).square().sum().item(), b.square().sum().item()
    if math.isfinite(error) and math.isfinite(size):
        return error, size
    same = (a == b) | (a.isnan() & b.isnan())
    error = torch.where(same, 0.0, a - b).square().sum().item()
    return error, torch.where(b.isfinite(), b, 0.0).square().sum().item()


def forward(dtype: torch.dtype) -> float:
    """Return the tolerance of a forward computation in this dtype; the fp32 one for integers."""
    return FORWARD.get(dtype, FORWARD[torch.float32])
