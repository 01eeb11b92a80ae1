"""Properties of ops: cost, bytes of state, and whether they are pure."""

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
    """Location of a node for its cost: loop and trip, if any, and number of tokens in context."""

    context: int
    loop: Loop | None = None
    trip: int = 0

    def resolve(self, value: Any) -> Any:
        """Resolve an argument in this trip, where it is an input of the loop."""
        return value if self.loop is None else self.loop.resolve(value, self.trip)


Cost: TypeAlias = Callable[[fx.Node, Place], int]

FLOPS: dict[Any, Cost] = {}
STATE: dict[Any, Cost] = {}


def register(target: Any, *, flops: Cost | None = None, state: Cost | None = None) -> None:
    """Register the costs of an op: operations per token, and bytes of state per sequence."""
    if flops is not None:
        FLOPS[target] = flops
    if state is not None:
        STATE[target] = state


def is_stateful(node: fx.Node) -> bool:
    """Whether a node reads and writes state of its own, from one call of the model to the next."""
    return node.target in STATE


def is_pure(node: fx.Node) -> bool:
    """Whether a call always gives the same result for the same arguments."""
    tags = getattr(node.target, "tags", ())
    return not is_stateful(node) and torch.Tag.nondeterministic_seeded not in tags


def count(dims: tuple[Dim, ...]) -> int:
    """Count the elements for one token; symbolic dimensions (batch, length) count as 1."""
    return math.prod(d for d in dims if isinstance(d, int))
