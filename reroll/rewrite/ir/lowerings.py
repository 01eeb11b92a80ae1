"""Table of lowerings from ops to operators of export targets, filled where ops are defined.

A pass or a mixer with an op of its own registers in its own file how a target expresses it:

    @lowering("onnx", "my::scaled_tanh.default")
    def scaled_tanh(g, node, x, scale):
        return g.op("Mul", g.op("Tanh", x), g.number(scale, x.dtype))

The target defines the function's arguments and its result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from reroll.errors import UsageError

Lowering = Callable[..., Any]
Function = TypeVar("Function", bound=Callable[..., Any])

_lowerings: dict[tuple[str, str], Lowering] = {}


def lowering(target: str, *ops: str) -> Callable[[Function], Function]:
    """Register how a target expresses the ops of these names, such as "reroll::rope.default".

    A name without overload, such as "aten::add", is for all overloads without a lowering of theirs.

    Raises UsageError if an op already has another lowering to this target.
    """

    def register(function: Function) -> Function:
        for op in ops:
            known = _lowerings.get((target, op))
            if known is not None and _identity(known) != _identity(function):
                raise UsageError(f"there are two lowerings of {op} to {target}", where=op)
            _lowerings[target, op] = function
        return function

    return register


def from_file(path: str) -> list[str]:
    """The ops of which a Python file gives a lowering, sorted."""
    return sorted(op for (_, op), known in _lowerings.items() if _identity(known)[0] == path)


def find_lowering(target: str, op: Any) -> Lowering | None:
    """Find the lowering of an op, given as in a graph; None if there is none."""
    name = op_name(op)
    return _lowerings.get((target, name)) or _lowerings.get((target, without_overload(name)))


def op_name(op: Any) -> str:
    """Return the name under which an op's lowerings are registered, such as "aten::add.Tensor".

    Python functions are named by their module, such as "operator.mul".
    """
    if isinstance(op, str):
        return op
    schema = getattr(op, "_schema", None)
    if schema is None:
        module = str(getattr(op, "__module__", "")).removeprefix("_")
        return f"{module}.{getattr(op, '__name__', op)}"
    return f"{schema.name}.{schema.overload_name or 'default'}"


def without_overload(name: str) -> str:
    """Return an op's name without its overload: "aten::add" of "aten::add.Tensor"."""
    return name.rpartition(".")[0]


def _identity(function: Lowering) -> tuple[str, str]:
    # a file that is loaded again replaces its lowerings
    return str(function.__code__.co_filename), str(getattr(function, "__name__", function))
