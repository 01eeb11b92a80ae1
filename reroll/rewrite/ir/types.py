"""The types of nodes: where they are kept, and how they are found by running ops without data.

A dimension that is known only at run time stands in such a run as a size that no model has, one
for each name, and gets its name back afterwards.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from reroll.errors import ProgramError, RerollError
from reroll.rewrite.ir import ops
from reroll.rewrite.ir.program import Loop
from reroll.rewrite.ir.records import Dim, TensorType

# primes, so that a size is seldom one of them by chance
_SIZES = (100003, 100019, 100043, 100049, 100057, 100069, 100103, 100109)


def type_of(node: Any) -> TensorType | None:
    """The type of a node; None if it makes no tensor, or several, or the type is not known."""
    kind = node.meta.get("type") if isinstance(node, fx.Node) else None
    return kind if isinstance(kind, TensorType) else None


def set_type(node: fx.Node, kind: TensorType | None) -> None:
    """Say what a node makes; None leaves the node as it is."""
    if kind is not None:
        node.meta["type"] = kind


def set_dtype(node: fx.Node, dtype: torch.dtype | None) -> None:
    """Change the dtype in the type of a node that has one."""
    kind = type_of(node)
    if kind is not None and dtype is not None:
        node.meta["type"] = TensorType(dtype, kind.shape)


def infer(node: fx.Node, loop: Loop | None = None) -> None:
    """Find the type of a call from those of its arguments.

    `loop` is the loop whose body the node stands in, if that has numbers among its inputs. Without
    all arguments' types, the node stays without one. Raises ProgramError if the op does not run on
    them, or makes a size that has no name.
    """
    sizes = Sizes()
    run = _Run(sizes, loop)
    try:
        value = run.value(node)
    except RerollError:
        raise
    except Exception as error:
        if run.unknown:
            return
        reason = str(error).strip().partition("\n")[0]
        raise ProgramError(f"{node.target} does not run: {reason}", where=node.name) from error
    if isinstance(value, Tensor):
        with_names = tuple(sizes.name(size, node) for size in value.shape)
        set_type(node, TensorType(value.dtype, with_names))


class Sizes:
    """Sizes that stand for the names of dimensions."""

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}
        self._numbers: set[int] = set()

    def empty(self, kind: TensorType) -> Tensor:
        """A tensor of a type, without data."""
        return torch.empty([self._size(d) for d in kind.shape], dtype=kind.dtype, device="meta")

    def _size(self, dim: Dim) -> int:
        if isinstance(dim, int):
            self._numbers.add(dim)
            return dim
        return self._sizes.setdefault(dim, _SIZES[len(self._sizes)])

    def named(self) -> Mapping[int, str]:
        """The names of the dimensions, by their sizes."""
        return {size: name for name, size in self._sizes.items()}

    def name(self, size: int, node: fx.Node) -> Dim:
        """The dimension of a size. ProgramError where it is made of one that has a name."""
        if size in (names := self.named()):
            return names[size]
        if names and size >= _SIZES[0] and size not in self._numbers:
            raise ProgramError(
                f"a dimension of {node.target} is made of {', '.join(names.values())}, and has "
                "no name of its own",
                where=node.name,
            )
        return size


class _Run:
    """Runs nodes without data, from the types of what they read."""

    def __init__(self, sizes: Sizes, loop: Loop | None) -> None:
        self.sizes, self.loop = sizes, loop
        # whether something was read that has no type
        self.unknown = False

    def value(self, node: fx.Node) -> Any:
        """What a call makes."""
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._read)
        return run_without_data(node.target, args, dict(kwargs))

    def _read(self, node: fx.Node) -> Any:
        kind = type_of(node)
        if kind is not None:
            return self.sizes.empty(kind)
        if node.op == "call_function":
            if node.target is ops.loop:
                return tuple(map(self._read, node.args[1]))  # type: ignore[arg-type]
            return self.value(node)
        if self.loop is not None and not isinstance(given := self.loop.resolve(node, 0), fx.Node):
            return given
        # a number, or a tensor of which nothing is known
        self.unknown = True
        return 1


def run_without_data(target: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What an op makes of tensors on the meta device."""
    schema = getattr(target, "_schema", None)
    if any(a.name == "device" for a in getattr(schema, "arguments", ())):
        kwargs = {**kwargs, "device": "meta"}
    return operator.getitem(*args) if target is operator.getitem else target(*args, **kwargs)
