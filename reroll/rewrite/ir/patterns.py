"""Results of matching a pattern: a match with its bindings, or a miss with the reason.

A failed match is data. A function that tries a pattern returns a `Match` or a `Miss`, which callers
test like a bool. The nearest miss tells the user why nothing was rewritten:

    found = [match_rms_norm(node) for node in graph.nodes]
    if not any(found):
        context.remark(nearest(m for m in found if isinstance(m, Miss)))
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Match:
    """Result of a pattern that matched.

    Attributes:
        pattern: the pattern's name.
        bound: the values of its variables: nodes, numbers, or other values.
        nodes: names of the nodes of the region that it covers.
    """

    pattern: str
    bound: Mapping[str, Any] = field(default_factory=dict)
    nodes: tuple[str, ...] = ()

    def __bool__(self) -> Literal[True]:
        return True

    def __getitem__(self, name: str) -> Any:
        return self.bound[name]


@dataclass(frozen=True)
class Miss:
    """Result of a pattern that did not match.

    Attributes:
        reason: what was expected and what was found, as a clause without a full stop.
        nodes: names of the nodes at fault, the most relevant first.
        pattern: the pattern's name, if it has one.
        depth: how many of the pattern's conditions held before one failed; the larger, the
            nearer to a match.
    """

    reason: str
    nodes: tuple[str, ...] = ()
    pattern: str = ""
    depth: int = 0

    def __bool__(self) -> Literal[False]:
        return False

    def __str__(self) -> str:
        name = f"{self.pattern}: " if self.pattern else ""
        return f"{name}{self.reason}" + (f" (at {', '.join(self.nodes)})" if self.nodes else "")


def nearest(misses: Iterable[Miss]) -> Miss | None:
    """Return the first miss of the greatest depth; None without any miss."""
    return max(misses, key=lambda miss: miss.depth, default=None)
