"""Lazy tensors: expression trees over the tensors of a checkpoint.

An expression is immutable and content-addressed: its digest is a hash of its operator and of its
arguments' digests. So equality and hashing take constant time, and equal subtrees count as one
subtree, wherever they were built.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from reroll.errors import ProgramError

DTYPES: dict[str, torch.dtype] = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "i64": torch.int64,
    "i32": torch.int32,
    "i16": torch.int16,
    "i8": torch.int8,
    "u8": torch.uint8,
    "b1": torch.bool,
}
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

MAX_ELEMENTS = 2**40
MAX_DIMS = 16


def dtype_from_name(name: object) -> torch.dtype:
    """Return the dtype called ``name`` ("bf16", "f32", ...); ProgramError if there is none."""
    if not isinstance(name, str) or name not in DTYPES:
        raise ProgramError(f"unknown dtype {name!r}", hint=f"use one of {', '.join(DTYPES)}")
    return DTYPES[name]


@dataclass(frozen=True)
class Meta:
    """Shape and dtype of a tensor that need not exist yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_NAMES:
            raise ProgramError(f"a weight table does not support dtype {self.dtype}")
        for size in self.shape:
            if isinstance(size, bool) or not isinstance(size, int) or size < 0:
                raise ProgramError(f"{size!r} is not a size of a dimension")
        object.__setattr__(self, "shape", tuple(self.shape))
        if len(self.shape) > MAX_DIMS or self.elements > MAX_ELEMENTS:
            raise ProgramError(f"a tensor of shape {list(self.shape)} is absurdly large")

    @property
    def elements(self) -> int:
        """Number of scalars."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return self.elements * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{DTYPE_NAMES[self.dtype]}[{', '.join(map(str, self.shape))}]"


def meta_of(tensor: Tensor) -> Meta:
    """Return the Meta of an existing tensor."""
    return Meta(tuple(tensor.shape), tensor.dtype)


class TensorSource(Protocol):
    """Source of named tensors that are read one at a time, such as a checkpoint."""

    def names(self) -> Iterable[str]:
        """Return the names of all tensors."""
        ...

    def meta(self, name: str) -> Meta:
        """Return shape and dtype of one tensor without reading it; CheckpointError if missing."""
        ...

    def load(self, name: str) -> Tensor:
        """Load one tensor on the CPU, which the caller may write to; CheckpointError if missing."""
        ...


class Expr:
    """Lazy tensor: a `Source` or an `Apply`. Compared by content, in constant time."""

    meta: Meta
    digest: bytes

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Expr) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __copy__(self) -> Expr:
        return self

    def __deepcopy__(self, memo: object) -> Expr:
        return self


Argument: TypeAlias = "Expr | int | float | str | bool | tuple[int, ...]"


def _digest(*parts: object) -> bytes:
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()


@dataclass(frozen=True, eq=False)
class Source(Expr):
    """Tensor of the checkpoint. If its floating dtype differs from the file's, loading casts it."""

    name: str
    meta: Meta
    digest: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ProgramError(f"{self.name!r} is not a tensor name")
        object.__setattr__(self, "digest", _digest("source", self.name, str(self.meta)))

    def __repr__(self) -> str:
        return f"<source {self.name!r} {self.meta}>"


@dataclass(frozen=True, eq=False)
class Apply(Expr):
    """Application of a registered weight function to expressions and constants."""

    op: str
    args: tuple[Argument, ...]
    meta: Meta
    digest: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        args, meta = infer(self.op, self.args)
        if meta != self.meta:
            raise ProgramError(f"{self.op} gives {meta}, not {self.meta}")
        object.__setattr__(self, "args", args)
        parts = [a.digest if isinstance(a, Expr) else a for a in args]
        object.__setattr__(self, "digest", _digest("apply", self.op, parts))

    @property
    def children(self) -> tuple[Expr, ...]:
        """Arguments that are expressions."""
        return tuple(a for a in self.args if isinstance(a, Expr))

    def __repr__(self) -> str:
        return f"<{self.op} of {len(self.children)} {self.meta}>"


def children(expr: Expr) -> tuple[Expr, ...]:
    """Return the direct sub-expressions."""
    return expr.children if isinstance(expr, Apply) else ()


def walk(roots: Iterable[Expr]) -> Iterator[Expr]:
    """Yield every distinct sub-expression once, arguments before their users, left to right."""
    done: set[Expr] = set()
    for root in roots:
        stack = [(root, False)]
        while stack:
            expr, ready = stack.pop()
            if expr in done:
                continue
            if ready or not children(expr):
                done.add(expr)
                yield expr
            else:
                stack.append((expr, True))
                stack.extend((child, False) for child in reversed(children(expr)))


# filled by `registry.weight_function`; defined here so that an Apply can check itself
Inference: TypeAlias = Callable[[tuple[Argument, ...]], "tuple[tuple[Argument, ...], Meta]"]
INFERENCES: dict[str, Inference] = {}


def infer(op: str, args: Iterable[Argument]) -> tuple[tuple[Argument, ...], Meta]:
    """Infer normalised arguments and the result's Meta; ProgramError if they do not fit."""
    inference = INFERENCES.get(op) if isinstance(op, str) else None
    if inference is None:
        raise ProgramError(
            f"unknown weight function {op!r}", hint=f"known: {', '.join(sorted(INFERENCES))}"
        )
    return inference(tuple(args))


def build(op: str, *args: Argument) -> Apply:
    """Apply a registered weight function, checking arguments and computing the result's Meta."""
    normal, meta = infer(op, args)
    return Apply(op, normal, meta)
