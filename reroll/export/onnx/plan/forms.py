"""Stored forms of weights: what the bytes of a weight in the file are."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from reroll.rewrite.ir.weights.expressions import Meta


@dataclass(frozen=True)
class Form:
    """Stored form of a weight: `make` computes it from the weight's own tensor.

    `name` identifies the form; "" is the unchanged tensor. `dtype` and `shape` are the result's.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[Tensor], Tensor] = field(compare=False)

    @property
    def bytes(self) -> int:
        """Bytes of one entry."""
        return math.prod(self.shape) * self.dtype.itemsize

    def named(self, weight: str) -> str:
        """Return the name of a weight in this form."""
        return f"{weight}.{self.name}" if self.name else weight


def plain(meta: Meta, dtype: torch.dtype) -> Form:
    """Return the form of an unchanged weight, in a dtype."""
    return Form("", dtype, meta.shape, lambda t: t.to(dtype))


def transposed(meta: Meta, dtype: torch.dtype) -> Form:
    """Return the form of a matrix, or a stack of them, as [inputs, outputs], which MatMul takes."""
    *several, rows, columns = meta.shape
    shape = (*several, columns, rows)
    return Form("transposed", dtype, shape, lambda t: t.to(dtype).transpose(-2, -1))


def offset(meta: Meta, dtype: torch.dtype, amount: float) -> Form:
    """Return the form of a weight plus a number, added in fp32."""
    return Form(f"plus_{amount:g}", dtype, meta.shape, lambda t: (t.float() + amount).to(dtype))
