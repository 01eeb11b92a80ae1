"""Checks of one node: whether a program may hold it, and whether its call fits its schema."""

from __future__ import annotations

import difflib
import operator
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from reroll.rewrite.ir import ops
from reroll.rewrite.ir.records import TensorType
from reroll.rewrite.ir.text.literals import misfit, nodes_in
from reroll.rewrite.ir.text.op_names import op_name
from reroll.rewrite.ir.types import type_of

_SCALAR = (int, float, bool)
# types of constants that the dispatcher accepts for a parameter; a node is always accepted
_CONSTANTS: dict[str, tuple[type, ...]] = {
    "Tensor": _SCALAR,
    "number": _SCALAR,
    "float": _SCALAR,
    "int": (int,),
    "bool": (bool, int),
    "str": (str,),
    "ScalarType": (torch.dtype,),
    "Layout": (torch.layout,),
    "MemoryFormat": (torch.memory_format,),
    "Device": (torch.device, str),
}


def node_problem(node: fx.Node, in_body: bool) -> str | None:
    """Return what is wrong with a node by itself, or None."""
    if not isinstance(node.meta.get("type"), TensorType | None):
        return 'its meta["type"] is not a TensorType'
    if node.op == "placeholder":
        return "an input has no default" if node.args or node.kwargs else None
    if node.op == "get_attr":
        return None if isinstance(node.target, str) else "it reads no weight's name"
    for value in (*node.args, *node.kwargs.values()):
        reason = misfit(value)
        if reason is not None:
            return f"an argument {reason}"
    if node.op == "output":
        plain = len(node.args) == 1 and isinstance(node.args[0], tuple)
        return None if plain else "a graph returns a tuple"
    if node.op != "call_function":
        return f"a program has no {node.op} nodes"
    if op_name(node.target) is None:
        name = getattr(node.target, "__name__", str(node.target))
        return f"{name} is not an op of a program"
    if node.target is ops.loop:
        return "a loop cannot stand in the body of a loop" if in_body else None
    if isinstance(node.target, OpOverload):
        return call_problem(node.target, node.args, node.kwargs)
    return _getitem_problem(node) if node.target is operator.getitem else None


def call_problem(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Return why an op cannot be called with these arguments, or None."""
    parameters = op._schema.arguments
    positional = [p for p in parameters if not p.kwarg_only]
    if len(args) > len(positional):
        return f"{op} takes {len(positional)} arguments without a name, not {len(args)}"
    arguments = {p.name: value for p, value in zip(positional, args, strict=False)}
    names = [p.name for p in parameters]
    for name, value in kwargs.items():
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
            return (
                f"{op} has no argument {name!r}; the nearest is {near[0]!r}"
                if near
                else (f"{op} has no argument {name!r}")
            )
        if name in arguments:
            return f"{op} is given {name!r} twice"
        arguments[name] = value
    for parameter in parameters:
        if parameter.name not in arguments:
            if not parameter.has_default_value():
                return f"{op} needs the argument {parameter.name!r}"
        elif not accepts(str(parameter.real_type), arguments[parameter.name]):
            value = arguments[parameter.name]
            return f"{op} takes {parameter.real_type} for {parameter.name!r}, not {value!r:.60}"
    return None


def accepts(type_name: str, value: Any) -> bool:
    """Whether a value is accepted for a parameter of a schema's type, such as `List[int]`."""
    if isinstance(value, fx.Node):
        return True
    if type_name.startswith("Optional["):
        return value is None or accepts(type_name.removeprefix("Optional[")[:-1], value)
    if type_name.startswith("List["):
        item = type_name.removeprefix("List[")[:-1]
        if isinstance(value, list | tuple):
            return all(accepts(item, v) for v in value)
        # the dispatcher expands one number to a list of fixed length
        return accepts(item, value) if item != "Tensor" else False
    return isinstance(value, _CONSTANTS.get(type_name, ()))


def fitting(value: Any, type_: TensorType | None) -> bool:
    """Whether a value may have this type, as far as its own type is known."""
    known = type_of(value)
    if known is None or type_ is None:
        return True
    return (
        known.dtype == type_.dtype
        and len(known.shape) == len(type_.shape)
        and all(
            a == b or isinstance(a, str) or isinstance(b, str)
            for a, b in zip(known.shape, type_.shape, strict=True)
        )
    )


def _getitem_problem(node: fx.Node) -> str | None:
    if len(node.args) != 2 or node.kwargs or not isinstance(node.args[0], fx.Node):
        return "getitem takes a node and a number"
    return (
        None
        if list(nodes_in(node.args[1])) or type(node.args[1]) is int
        else ("getitem takes a node and a number")
    )
