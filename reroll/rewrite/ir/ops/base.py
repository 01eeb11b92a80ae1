"""What ops say of themselves beside their bodies: cost, state, and whether they are pure."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import fx

if TYPE_CHECKING:
    from reroll.rewrite.ir.program import Loop
    from reroll.rewrite.ir.records import Dim


@dataclass(frozen=True)
class Place:
    """Where a node is: which trip of which loop, if any, and how many tokens are in context."""

    context: int
    loop: Loop | None = None
    trip: int = 0

    def resolve(self, value: Any) -> Any:
        """A constant, or what a loop's input holds in this trip where that is a constant."""
        return value if self.loop is None else self.loop.resolve(value, self.trip)


Cost: TypeAlias = Callable[[fx.Node, Place], int]

FLOPS: dict[Any, Cost] = {}
STATE: dict[Any, Cost] = {}


def register(target: Any, *, flops: Cost | None = None, state: Cost | None = None) -> None:
    """Say what one op costs: operations per token, and bytes of state for each sequence."""
    if flops is not None:
        FLOPS[target] = flops
    if state is not None:
        STATE[target] = state


def is_pure(node: fx.Node) -> bool:
    """Whether a call gives the same result for the same arguments, wherever it stands."""
    tags = getattr(node.target, "tags", ())
    return node.target not in STATE and torch.Tag.nondeterministic_seeded not in tags


def count(dims: tuple[Dim, ...]) -> int:
    """Elements for one token: batch and length count once."""
    return math.prod(d for d in dims if isinstance(d, int))
