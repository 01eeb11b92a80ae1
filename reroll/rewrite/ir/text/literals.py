"""Format and check the arguments of nodes.

A node is `%name`, a weight `@name`. Numbers, lists and tuples are written as in Python, strings as
in JSON, and a word of `WORDS` is one constant. Nothing else is an argument.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from reroll.rewrite.ir.records import TensorType
from reroll.rewrite.ir.weights.expressions import DTYPE_NAMES

MAX_DEPTH = 32
MAX_INT = 2**63 - 1

BARE_NAME = re.compile(r"[A-Za-z0-9_][\w.*\-/]*", re.ASCII)
BARE_DIM = re.compile(r"[A-Za-z_]\w*", re.ASCII)


def _words() -> dict[str, Any]:
    words: dict[str, Any] = {"none": None, "true": True, "false": False}
    words.update(inf=float("inf"), nan=float("nan"))
    kinds = torch.dtype | torch.layout | torch.memory_format
    # torch has several names for one dtype: the printed one is used
    for value in (v for v in vars(torch).values() if isinstance(v, kinds)):
        ours = DTYPE_NAMES.get(value) if isinstance(value, torch.dtype) else None
        words[ours or str(value).removeprefix("torch.")] = value
    return words


WORDS: dict[str, Any] = _words()
_WORD_OF = {
    value: word for word, value in WORDS.items() if not isinstance(value, bool | float | None)
}

Namer = Callable[[fx.Node], str]


def node_name(node: fx.Node) -> str:
    """Format a node as an argument: `%name`, or `@weight` for a `get_attr` node."""
    return weight_name(str(node.target)) if node.op == "get_attr" else f"%{node.name}"


def weight_name(name: str) -> str:
    """Format the name of a weight as an argument."""
    return f"@{bare(name)}"


def bare(name: str) -> str:
    """Return a name unchanged if it has ordinary characters only, else as a JSON string."""
    return name if BARE_NAME.fullmatch(name) else json.dumps(name)


def value_to_text(value: Any, name: Namer = node_name, depth: int = 0) -> str:
    """Format an argument. A value that is no valid argument prints with `?` and does not parse."""
    if depth > MAX_DEPTH:
        return "?deep"
    if isinstance(value, fx.Node):
        return name(value)
    if isinstance(value, bool | None):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value) if type(value) in (int, float) else f"?{type(value).__name__}"
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, torch.device):
        return f"device({json.dumps(str(value))})"
    if isinstance(value, list):
        return f"[{', '.join(value_to_text(v, name, depth + 1) for v in value)}]"
    if isinstance(value, tuple):
        items = [value_to_text(v, name, depth + 1) for v in value]
        return f"({items[0]},)" if len(items) == 1 else f"({', '.join(items)})"
    if isinstance(value, torch.dtype | torch.layout | torch.memory_format):
        return _WORD_OF[value]
    return f"?{type(value).__name__}"


def type_to_text(type_: TensorType) -> str:
    """Format a tensor type: `f32[b, s, 576]`."""
    return f"{_WORD_OF[type_.dtype]}[{', '.join(map(_dim, type_.shape))}]"


def _dim(dim: int | str) -> str:
    return dim if isinstance(dim, str) and BARE_DIM.fullmatch(dim) else json.dumps(dim)


def misfit(value: Any, depth: int = 0) -> str | None:
    """Return why a value cannot be an argument, or None if it can."""
    if depth > MAX_DEPTH:
        return f"nests deeper than {MAX_DEPTH}"
    if isinstance(value, list | tuple):
        return next((m for v in value if (m := misfit(v, depth + 1)) is not None), None)
    if type(value) is int and abs(value) > MAX_INT:
        return f"holds {str(value) if abs(value) < 10**40 else 'an integer'} beyond 64 bits"
    if value_to_text(value).startswith("?"):
        return f"holds a {type(value).__name__}, which a program cannot"
    return None


def nodes_in(value: Any) -> Iterator[fx.Node]:
    """Yield the nodes in an argument, in order."""
    if isinstance(value, fx.Node):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from nodes_in(item)
    elif isinstance(value, dict):
        yield from nodes_in(list(value.values()))
