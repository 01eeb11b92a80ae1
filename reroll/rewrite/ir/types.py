"""Types of nodes: read, set, and inferred by running ops on meta tensors.

In such a run, each symbolic dimension is replaced by a size that no model has, and replaced back by
its name afterwards.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from reroll.errors import ProgramError, RerollError
from reroll.rewrite.ir import ops
from reroll.rewrite.ir.records import Dim, TensorType

if TYPE_CHECKING:
    from reroll.rewrite.ir.program import Loop

# primes, so that a computed size is hardly ever one of them by chance
_SIZES = (100003, 100019, 100043, 100049, 100057, 100069, 100103, 100109)


def type_of(node: Any) -> TensorType | None:
    """Return the type of a node; None if unknown, or if its value is not one tensor."""
    type_ = node.meta.get("type") if isinstance(node, fx.Node) else None
    return type_ if isinstance(type_, TensorType) else None


def set_type(node: fx.Node, type_: TensorType | None) -> None:
    """Set the type of a node; None leaves the node unchanged."""
    if type_ is not None:
        node.meta["type"] = type_


def set_dtype(node: fx.Node, dtype: torch.dtype | None) -> None:
    """Change the dtype in the type of a node that has one."""
    type_ = type_of(node)
    if type_ is not None and dtype is not None:
        node.meta["type"] = TensorType(dtype, type_.shape)


def infer(node: fx.Node, loop: Loop | None = None) -> None:
    """Infer the type of a call from those of its arguments.

    `loop` is the loop whose body contains the node, if its inputs include numbers. If an argument's
    type is unknown, the node gets none. Raises ProgramError if the op does not run on these types,
    or if a symbolic size of the result has no name.
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
    """Bijection between names of dimensions and the sizes that replace them."""

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}
        self._numbers: set[int] = set()

    def empty(self, type_: TensorType) -> Tensor:
        """Create a meta tensor of a type."""
        return torch.empty([self._size(d) for d in type_.shape], dtype=type_.dtype, device="meta")

    def _size(self, dim: Dim) -> int:
        if isinstance(dim, int):
            self._numbers.add(dim)
            return dim
        return self._sizes.setdefault(dim, _SIZES[len(self._sizes)])

    def names(self) -> Mapping[int, str]:
        """Return the names of the dimensions, by their sizes."""
        return {size: name for name, size in self._sizes.items()}

    def name(self, size: int, node: fx.Node) -> Dim:
        """Return the dimension of a size; ProgramError for a size derived from a symbolic one."""
        if size in (names := self.names()):
            return names[size]
        if names and size >= _SIZES[0] and size not in self._numbers:
            raise ProgramError(
                f"a dimension of {node.target} is made of {', '.join(names.values())}, and has "
                "no name of its own",
                where=node.name,
            )
        return size


class _Run:
    """Evaluation of nodes on meta tensors, from the types of their arguments."""

    def __init__(self, sizes: Sizes, loop: Loop | None) -> None:
        self.sizes, self.loop = sizes, loop
        # whether an argument without a type was read
        self.unknown = False

    def value(self, node: fx.Node) -> Any:
        """Compute the value of a call on meta tensors."""
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._read)
        return run_without_data(node.target, args, dict(kwargs))

    def _read(self, node: fx.Node) -> Any:
        type_ = type_of(node)
        if type_ is not None:
            return self.sizes.empty(type_)
        if node.op == "call_function":
            if node.target is ops.loop:
                return tuple(map(self._read, node.args[1]))  # type: ignore[arg-type]
            return self.value(node)
        if self.loop is not None and not isinstance(value := self.loop.resolve(node, 0), fx.Node):
            return value
        # a number, or a tensor of unknown type
        self.unknown = True
        return 1


def run_without_data(target: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an op on tensors on the meta device."""
    schema = getattr(target, "_schema", None)
    if any(a.name == "device" for a in getattr(schema, "arguments", ())):
        kwargs = {**kwargs, "device": "meta"}
    return operator.getitem(*args) if target is operator.getitem else target(*args, **kwargs)
