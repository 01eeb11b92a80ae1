"""How far two computations of one thing may differ: relative RMS error, per dtype, in one place."""

from __future__ import annotations

import torch
from torch import Tensor

# |a - b| / |b| of what one computation and its reference give
FORWARD: dict[torch.dtype, float] = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 5e-3,
}
GRADIENT = 8e-3
# Triton in fp32 without TF32 adds up in another order
FORWARD_TRITON_FP32 = 1e-4
# raising and rolling move no arithmetic, so only rounding inside single ops is left
ROLLED: dict[torch.dtype, float] = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 5e-3,
}


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of `expected`; inf where one is not finite.

    Elements that are the same in both, infinities included, count as no difference.
    """
    if actual.shape != expected.shape:
        return float("inf")
    a, b = actual.detach().double(), expected.detach().double()
    same = (a == b) | (a.isnan() & b.isnan())
    difference = torch.where(same, 0.0, a - b)
    scale = torch.where(b.isfinite(), b, 0.0).square().mean().sqrt().item() if b.numel() else 0.0
    error = difference.square().mean().sqrt().item() if a.numel() else 0.0
    if error != error:
        return float("inf")
    return error / scale if scale else (float("inf") if error else 0.0)


def forward(dtype: torch.dtype) -> float:
    """The tolerance of a forward computation in this dtype; the fp32 one for integers."""
    return FORWARD.get(dtype, FORWARD[torch.float32])
