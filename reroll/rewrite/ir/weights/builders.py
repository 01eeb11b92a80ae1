"""Typed constructors of weight expressions; each raises ProgramError if the shapes do not fit.

The result of arithmetic on bf16 tensors is rounded to bf16. To keep the intermediate precision,
cast the leaves: ``cast(svd_up(sub(cast(w, torch.float32), shared), 64), torch.bfloat16)``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from reroll.rewrite.ir.weights.expressions import DTYPE_NAMES, Expr, build


def mean(xs: Sequence[Expr]) -> Expr:
    """Return the elementwise mean of tensors of one shape, which are read one at a time."""
    return build("mean", *xs)


def add(a: Expr, b: Expr) -> Expr:
    """Return ``a + b`` with broadcasting."""
    return build("add", a, b)


def sub(a: Expr, b: Expr) -> Expr:
    """Return ``a - b`` with broadcasting."""
    return build("sub", a, b)


def mul(a: Expr, b: Expr) -> Expr:
    """Return ``a * b``, elementwise with broadcasting."""
    return build("mul", a, b)


def scale(x: Expr, factor: float) -> Expr:
    """Return ``x * factor``."""
    return build("scale", x, factor)


def offset(x: Expr, amount: float) -> Expr:
    """Return ``x + amount``."""
    return build("offset", x, amount)


def cast(x: Expr, dtype: torch.dtype) -> Expr:
    """Cast ``x`` to another dtype; return ``x`` itself if it has that dtype."""
    return x if x.meta.dtype == dtype else build("cast", x, DTYPE_NAMES.get(dtype, str(dtype)))


def copy(x: Expr, number: int) -> Expr:
    """Copy ``x``; the copy is not tied to ``x`` or to copies with other numbers."""
    return build("copy", x, number)


def transpose(x: Expr) -> Expr:
    """The transpose of a matrix."""
    return build("transpose", x)


def reshape(x: Expr, shape: Sequence[int]) -> Expr:
    """Reshape ``x``, with its elements in the same order."""
    return build("reshape", x, tuple(shape))


def slice_(x: Expr, dim: int, start: int, stop: int) -> Expr:
    """Slice the elements ``start:stop`` along one dimension."""
    return build("slice", x, dim, start, stop)


def concat(dim: int, xs: Sequence[Expr]) -> Expr:
    """Concatenate tensors along one dimension."""
    return build("concat", dim, *xs)


def matvec(w: Expr, b: Expr) -> Expr:
    """Return ``w @ b`` of a matrix [out, in] and a vector [in]."""
    return build("matvec", w, b)


def centre(x: Expr, dim: int) -> Expr:
    """Subtract from ``x`` its mean over one dimension."""
    return build("centre", x, dim)


def zeros(shape: Sequence[int], dtype: torch.dtype) -> Expr:
    """A tensor of zeros."""
    return build("zeros", tuple(shape), DTYPE_NAMES.get(dtype, str(dtype)))


def full(shape: Sequence[int], value: float, dtype: torch.dtype) -> Expr:
    """A tensor filled with one value."""
    return build("full", tuple(shape), value, DTYPE_NAMES.get(dtype, str(dtype)))


def normal(shape: Sequence[int], std: float, seed: int, dtype: torch.dtype) -> Expr:
    """Draw normally distributed numbers of mean 0 from a separate generator with this seed."""
    return build("normal", tuple(shape), float(std), seed, DTYPE_NAMES.get(dtype, str(dtype)))


def identity(size: int, dtype: torch.dtype) -> Expr:
    """The identity matrix."""
    return build("identity", size, DTYPE_NAMES.get(dtype, str(dtype)))


def svd_up(residual: Expr, rank: int, method: str = "exact") -> Expr:
    """Return the low-rank factor U_r S_r [out, r] of a residual [out, in], r = min(rank, out, in).

    With `svd_down` of the same arguments, ``up @ down`` is the best approximation of that rank; the
    two share one decomposition. ``method`` is "exact" or "randomized" (deterministic, faster on
    large matrices). Relaxed Recursive Transformers (arXiv 2410.20672), section 2.3.
    """
    return slice_(build("svd", residual, rank, method), 0, 0, residual.meta.shape[0])


def svd_down(residual: Expr, rank: int, method: str = "exact") -> Expr:
    """Return the low-rank factor V_r^T [r, in] of a residual [out, in]; see `svd_up`."""
    factors = build("svd", residual, rank, method)
    return transpose(slice_(factors, 0, residual.meta.shape[0], factors.meta.shape[0]))
