"""Low-rank factors of a matrix: truncated singular value decomposition, exact or randomized."""

from __future__ import annotations

import torch
from torch import Tensor

# matrices whose smaller side is at most this are decomposed in fp64
FP64_LIMIT = 256
OVERSAMPLING = 16
POWER_ITERATIONS = 4
SEED = 0


def low_rank_factors(matrix: Tensor, rank: int, method: str) -> tuple[Tensor, Tensor]:
    """Compute factors ``up`` [out, rank] = U_r S_r and ``down`` [rank, in] = V_r^T of ``matrix``.

    A rank of at least min(out, in) keeps everything, so ``up @ down`` restores the matrix. The
    signs are fixed (the largest component of each row of ``down`` is positive), so that equal
    matrices give equal factors. "randomized" is the range finder with power iterations of
    Halko, Martinsson and Tropp (arXiv 0909.4061, algorithms 4.4 and 5.1), with a fixed seed.
    """
    rank = min(rank, *matrix.shape)
    small = min(matrix.shape) <= FP64_LIMIT
    work = matrix.double() if small else matrix
    sketch = rank + OVERSAMPLING
    if method == "randomized" and sketch < min(matrix.shape):
        basis = _range_basis(work, sketch)  # [out, sketch]
        u, s, vt = torch.linalg.svd(basis.T @ work, full_matrices=False)
        u = basis @ u
    else:
        u, s, vt = torch.linalg.svd(work, full_matrices=False)
    u, s, vt = u[:, :rank], s[:rank], vt[:rank]
    peak = vt.gather(1, vt.abs().argmax(1, keepdim=True))  # [rank, 1]
    sign = torch.where(peak < 0, -1.0, 1.0).to(vt.dtype)
    return (u * s * sign.T).to(matrix.dtype), (vt * sign).to(matrix.dtype)


def _range_basis(matrix: Tensor, size: int) -> Tensor:
    """Approximate an orthonormal basis [out, size] of a matrix's dominant column space."""
    # a separate generator leaves the caller's random state unchanged
    generator = torch.Generator().manual_seed(SEED)
    probes = torch.randn(matrix.shape[1], size, generator=generator, dtype=torch.float64)
    basis: Tensor = torch.linalg.qr(matrix @ probes.to(matrix.dtype)).Q
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix.T @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    return basis
