"""Functions of weight expressions, each with its shape rule.

To add one, decorate a function of tensors and apply it with ``build("maximum", x, y)``:

    @weight_function(elementwise)
    def maximum(a: Tensor, b: Tensor) -> Tensor:
        return torch.maximum(a, b)

Arithmetic runs in fp32 (fp64 if an argument is fp64), and the result is cast to the dtype that the
shape rule returns.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from reroll.errors import ProgramError
from reroll.rewrite.ir.weights.expressions import Meta, dtype_from_name
from reroll.rewrite.ir.weights.factors import low_rank_factors
from reroll.rewrite.ir.weights.registry import weight_function

# ---- shape rules


def elementwise(*metas: Meta) -> Meta:
    """Broadcast shapes, promote dtypes."""
    try:
        shape = torch.broadcast_shapes(*(m.shape for m in metas))
    except RuntimeError:
        shapes = " and ".join(dict.fromkeys(str(m) for m in metas))
        raise ProgramError(f"shapes {shapes} do not broadcast") from None
    return Meta(tuple(shape), reduce(torch.promote_types, (m.dtype for m in metas)))


def _same_shape(*metas: Meta) -> Meta:
    if any(m.shape != metas[0].shape for m in metas):
        shapes = " and ".join(dict.fromkeys(str(m) for m in metas))
        raise ProgramError(f"tensors must have one shape, not {shapes}")
    return elementwise(*metas)


def _dim(meta: Meta, dim: int) -> int:
    if not 0 <= dim < len(meta.shape):
        raise ProgramError(f"{meta} has no dimension {dim}", hint="dimensions count from 0")
    return dim


def _matrix(meta: Meta) -> tuple[int, int]:
    if len(meta.shape) != 2:
        raise ProgramError(f"a matrix is needed, not {meta}")
    return meta.shape[0], meta.shape[1]


def _resized(meta: Meta, dim: int, size: int) -> Meta:
    return Meta((*meta.shape[:dim], size, *meta.shape[dim + 1 :]), meta.dtype)


def _slice_rule(x: Meta, dim: int, start: int, stop: int) -> Meta:
    size = x.shape[_dim(x, dim)]
    if not 0 <= start <= stop <= size:
        raise ProgramError(f"{start}:{stop} is not a range within dimension {dim} of {x}")
    return _resized(x, dim, stop - start)


def _concat_rule(dim: int, *xs: Meta) -> Meta:
    heads = {_resized(x, _dim(x, dim), 0) for x in xs}
    if len(heads) > 1:
        shapes = " and ".join(dict.fromkeys(str(x) for x in xs))
        raise ProgramError(f"{shapes} cannot be joined along dimension {dim}")
    return _resized(xs[0], dim, sum(x.shape[dim] for x in xs))


def _transpose_rule(x: Meta) -> Meta:
    rows, columns = _matrix(x)
    return Meta((columns, rows), x.dtype)


def _reshape_rule(x: Meta, shape: tuple[int, ...]) -> Meta:
    result = Meta(shape, x.dtype)
    if result.elements != x.elements:
        raise ProgramError(f"{x} cannot take the shape {list(shape)}")
    return result


def _matvec_rule(w: Meta, b: Meta) -> Meta:
    rows, columns = _matrix(w)
    if b.shape != (columns,):
        raise ProgramError(f"{w} cannot multiply a vector {b}")
    return Meta((rows,), torch.promote_types(w.dtype, b.dtype))


def _centre_rule(x: Meta, dim: int) -> Meta:
    if x.shape[_dim(x, dim)] == 0:
        raise ProgramError(f"{x} has no mean over dimension {dim}")
    return x


def _svd_rule(x: Meta, rank: int, method: str) -> Meta:
    rows, columns = _matrix(x)
    if method not in ("exact", "randomized"):
        raise ProgramError(f"unknown method {method!r}", hint='use "exact" or "randomized"')
    if rank < 1 or x.elements == 0:
        raise ProgramError(f"{x} has no factors of rank {rank}")
    return Meta((rows + columns, min(rank, rows, columns)), x.dtype)


# ---- functions


@weight_function(
    _same_shape, finish_sum=lambda total, count: total if count == 1 else total.div_(count)
)
def mean(*xs: Tensor) -> Tensor:
    """Return the elementwise mean of tensors of one shape."""
    return reduce(torch.add, xs) / len(xs)


@weight_function(elementwise)
def add(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a + b`` with broadcasting."""
    return a + b


@weight_function(elementwise)
def sub(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a - b`` with broadcasting."""
    return a - b


@weight_function(elementwise)
def mul(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a * b``, elementwise with broadcasting."""
    return a * b


@weight_function(lambda x, factor: x)
def scale(x: Tensor, factor: float) -> Tensor:
    """Return ``x * factor``."""
    return x * factor


@weight_function(lambda x, amount: x)
def offset(x: Tensor, amount: float) -> Tensor:
    """Return ``x + amount``."""
    return x + amount


@weight_function(_centre_rule)
def centre(x: Tensor, dim: int) -> Tensor:
    """Subtract from ``x`` its mean over a dimension."""
    return x - x.mean(dim, keepdim=True)


@weight_function(_matvec_rule)
def matvec(w: Tensor, b: Tensor) -> Tensor:
    """Return ``w @ b`` of a matrix [out, in] and a vector [in]."""
    return w @ b


@weight_function(_svd_rule)
def svd(x: Tensor, rank: int, method: str) -> Tensor:
    """Compute truncated factors of a matrix [out, in], U_r S_r over V_r: [out + in, rank]."""
    up, down = low_rank_factors(x, rank, method)
    return torch.cat([up, down.T])


# the following functions do no arithmetic, so they accept any dtype; results have their own
# memory, because a view would keep the whole tensor in memory


@weight_function(lambda x, dtype: Meta(x.shape, dtype_from_name(dtype)), arithmetic=False)
def cast(x: Tensor, dtype: str) -> Tensor:
    """Cast ``x`` to another dtype."""
    return x.to(dtype_from_name(dtype))


@weight_function(lambda x, number: x, arithmetic=False)
def copy(x: Tensor, number: int) -> Tensor:
    """Copy ``x``, to a separate tensor for each number."""
    return x.clone()


@weight_function(_transpose_rule, arithmetic=False)
def transpose(x: Tensor) -> Tensor:
    """The transpose of a matrix."""
    return x.T.contiguous()


@weight_function(_reshape_rule, arithmetic=False)
def reshape(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Reshape ``x``, with its elements in the same order."""
    return x.reshape(shape)


@weight_function(_slice_rule, name="slice", arithmetic=False)
def slice_(x: Tensor, dim: int, start: int, stop: int) -> Tensor:
    """Slice the elements ``start:stop`` along a dimension."""
    return x.narrow(dim, start, stop - start).clone(memory_format=torch.contiguous_format)


@weight_function(_concat_rule, arithmetic=False)
def concat(dim: int, *xs: Tensor) -> Tensor:
    """Concatenate tensors along a dimension."""
    return torch.cat(xs, dim)


@weight_function(lambda shape, dtype: Meta(shape, dtype_from_name(dtype)), arithmetic=False)
def zeros(shape: tuple[int, ...], dtype: str) -> Tensor:
    """A tensor of zeros."""
    return torch.zeros(shape, dtype=dtype_from_name(dtype))


@weight_function(lambda shape, value, dtype: Meta(shape, dtype_from_name(dtype)), arithmetic=False)
def full(shape: tuple[int, ...], value: float, dtype: str) -> Tensor:
    """A tensor filled with one value."""
    return torch.full(shape, value, dtype=dtype_from_name(dtype))


@weight_function(
    lambda shape, std, seed, dtype: Meta(shape, dtype_from_name(dtype)), arithmetic=False
)
def normal(shape: tuple[int, ...], std: float, seed: int, dtype: str) -> Tensor:
    """Draw normally distributed numbers of mean 0, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * std).to(dtype_from_name(dtype))


@weight_function(lambda size, dtype: Meta((size, size), dtype_from_name(dtype)), arithmetic=False)
def identity(size: int, dtype: str) -> Tensor:
    """The identity matrix."""
    return torch.eye(size, dtype=dtype_from_name(dtype))
