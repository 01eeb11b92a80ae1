"""Properties of a node's arguments that lowerings need."""

from __future__ import annotations

from typing import Any

from torch import fx

from reroll.export.onnx.graph import Value
from reroll.rewrite.ir.matching import shape


def shape_of(node: fx.Node, argument: int = 0) -> tuple[Any, ...]:
    """Return the shape of one of a node's arguments; empty for a number."""
    source: Any = node.args[argument]
    return shape(source) if isinstance(source, fx.Node) else ()


def repeated(value: Value, is_repeated: bool) -> Value:
    """Mark a value as one half twice in its last dimension, or remove the mark."""
    if value.repeated == is_repeated:
        return value
    return Value(value.name, value.dtype, value.scope, is_repeated)
