"""The outcome of trying a pattern: a match with what it bound, or a miss that says why not.

A failed match is data. Whoever tries a pattern returns a `Match` or a `Miss`, tests it like a bool,
and shows the nearest miss to the person who wonders why nothing was rewritten:

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
    """A pattern that matched.

    Attributes:
        pattern: the pattern's name.
        bound: what its variables stand for: nodes, numbers, or whatever the pattern binds.
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
    """A pattern that did not match.

    Attributes:
        reason: what was expected and what was found, as a clause without a full stop.
        nodes: names of the nodes at fault, the first the most telling.
        pattern: the pattern's name, if it has one.
        depth: how many of the pattern's conditions held before this one failed: the larger, the
            nearer it came to matching.
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
    """The miss that came nearest to matching, the first of equals; None without any miss."""
    return max(misses, key=lambda miss: miss.depth, default=None)
