"""Weights of a program: names in the graph, and the lazy expressions that compute them.

A weight outside loops has one expression. A weight inside a loop body is a stack of entries, with
the number of the entry that each trip of the loop uses. Two trips with the same number are tied. In
the name of a stacked weight, ``*`` stands for the trip.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from reroll.errors import ProgramError
from reroll.rewrite.ir.weights.expressions import Expr, Meta, Source, walk


@dataclass(frozen=True)
class Weight:
    """Weight of a graph: one expression, or a stack of them inside a loop.

    Attributes:
        entries: the distinct stored tensors, all of one Meta.
        index: None outside loops; otherwise the entry number that each trip uses.
        trainable: whether recovery may change it.
    """

    entries: tuple[Expr, ...]
    index: tuple[int, ...] | None = None
    trainable: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "entries", tuple(self.entries))
        if not self.entries:
            raise ProgramError("a weight needs at least one entry")
        other = next((e for e in self.entries if e.meta != self.meta), None)
        if other is not None:
            raise ProgramError(f"entries of one weight are {self.meta} and {other.meta}")
        if self.index is None:
            if len(self.entries) != 1:
                raise ProgramError(
                    f"a weight outside loops has 1 entry, not {len(self.entries)}",
                    hint="give the index that says which entry each trip uses",
                )
            return
        object.__setattr__(self, "index", tuple(self.index))
        unused = set(range(len(self.entries))) - set(self.index)
        outside = set(self.index) - set(range(len(self.entries)))
        if unused or outside:
            raise ProgramError(
                f"index {list(self.index)} does not fit {len(self.entries)} entries",
                hint="every entry must be used by a trip, and every trip must name an entry",
            )

    @property
    def meta(self) -> Meta:
        """Shape and dtype of the weight in one trip."""
        return self.entries[0].meta

    @property
    def trips(self) -> int | None:
        """Number of trips of its loop; None outside loops."""
        return None if self.index is None else len(self.index)

    def for_trip(self, trip: int) -> Expr:
        """Return the expression of a trip; outside loops, it is the same for any trip."""
        return self.entries[0] if self.index is None else self.entries[self.index[trip]]

    def elements(self) -> int:
        """Count the stored scalars."""
        return len(self.entries) * self.meta.elements


class WeightTable(Mapping[str, Weight]):
    """Ordered, immutable mapping from weight names to weights."""

    def __init__(self, weights: Mapping[str, Weight] | Iterable[tuple[str, Weight]] = ()) -> None:
        self._weights = dict(weights)
        for name, weight in self._weights.items():
            stars = name.count("*")
            if stars != (0 if weight.index is None else 1) or not name:
                raise ProgramError(
                    f"{name!r} is not a name for a weight "
                    + ("outside loops" if weight.index is None else "inside a loop"),
                    hint="the name of a weight in a loop, and no other, has one * for the trip",
                )

    def __getitem__(self, name: str) -> Weight:
        return self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WeightTable) and list(self.items()) == list(other.items())

    def __repr__(self) -> str:
        return f"<WeightTable of {len(self)} weights, {self.parameters():,} parameters>"

    def with_weight(self, name: str, weight: Weight) -> WeightTable:
        """Copy the table with one weight added at the end, or replaced."""
        return self.with_weights({name: weight})

    def with_weights(self, weights: Mapping[str, Weight]) -> WeightTable:
        """Copy the table with several weights added at the end, or replaced."""
        return WeightTable({**self._weights, **weights})

    def without(self, *names: str) -> WeightTable:
        """Copy the table without some weights; ProgramError if one is missing."""
        missing = [name for name in names if name not in self]
        if missing:
            raise ProgramError(f"no weight is called {missing[0]!r}")
        return WeightTable({n: w for n, w in self.items() if n not in names})

    def stored_name(self, name: str, entry: int) -> str:
        """Return the name of one entry in a saved file: ``*`` becomes the first trip that uses it.

        This is its name in the lowered module, so that a file can be loaded without the Program.
        """
        index = self[name].index
        return name if index is None else name.replace("*", str(index.index(entry)))

    def stored(self) -> dict[str, tuple[str, int]]:
        """Map the name of each tensor in a saved file to (weight name, entry), in order.

        Raises ProgramError if two entries would get the same name.
        """
        stored: dict[str, tuple[str, int]] = {}
        for name, weight in self.items():
            for entry in range(len(weight.entries)):
                key = self.stored_name(name, entry)
                if key in stored:
                    raise ProgramError(
                        f"{name!r} and {stored[key][0]!r} would both be saved as {key!r}",
                        hint="rename one of the two weights",
                    )
                stored[key] = name, entry
        return stored

    def sources(self) -> set[str]:
        """Return the names of the checkpoint tensors that the table reads."""
        roots = (entry for weight in self.values() for entry in weight.entries)
        return {expr.name for expr in walk(roots) if isinstance(expr, Source)}

    def identity(self, name: str, entry: int) -> Hashable:
        """Return the identity of a stored tensor: entries with the same identity are one Parameter.

        Equal expressions over checkpoint tensors are tied; equal constants are not.
        """
        expr = self[name].entries[entry]
        return expr if any(isinstance(e, Source) for e in walk([expr])) else (name, entry)

    def distinct(self) -> dict[Hashable, tuple[str, int]]:
        """Return (weight name, entry) of each stored tensor by identity; tied ones count once."""
        first: dict[Hashable, tuple[str, int]] = {}
        for name, weight in self.items():
            for entry in range(len(weight.entries)):
                first.setdefault(self.identity(name, entry), (name, entry))
        return first

    def parameters(self) -> int:
        """Count the stored trainable scalars; tied tensors count once."""
        names = [name for name, _ in self.distinct().values() if self[name].trainable]
        return sum(self[name].meta.elements for name in names)

    def bytes(self) -> int:
        """Return the bytes of all stored tensors; tied ones count once."""
        return sum(self[name].meta.bytes for name, _ in self.distinct().values())
