"""Sources of named tensors: in memory, or combined from other sources."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from reroll.errors import CheckpointError
from reroll.rewrite.ir.weights.expressions import Meta, TensorSource, meta_of


def missing_tensor(name: str, names: Iterable[str], where: str) -> CheckpointError:
    """Build the error for a missing tensor, with the nearest existing name."""
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    remedy = "take the whole checkpoint, and the configuration that belongs to it"
    hint = f"the nearest name is {near[0]!r}; {remedy}" if near else remedy
    return CheckpointError(f"there is no tensor {name!r}", where=where, hint=hint)


class MemorySource:
    """Source of tensors that are in memory."""

    def __init__(self, tensors: Mapping[str, Tensor], where: str = "tensors in memory") -> None:
        self._tensors, self._where = dict(tensors), where

    def names(self) -> Iterable[str]:
        """Names of all tensors."""
        return self._tensors.keys()

    def meta(self, name: str) -> Meta:
        """Shape and dtype of one tensor; CheckpointError if missing."""
        return meta_of(self._get(name))

    def load(self, name: str) -> Tensor:
        """A copy of one tensor on the CPU; CheckpointError if missing."""
        return self._get(name).detach().cpu().clone()

    def _get(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise missing_tensor(name, self._tensors, self._where)
        return self._tensors[name]


class ChainSource:
    """Combination of several sources: a name is read from the first source that has it."""

    def __init__(self, sources: Sequence[TensorSource]) -> None:
        self._sources = {name: source for source in reversed(sources) for name in source.names()}

    def names(self) -> Iterable[str]:
        """Names of all tensors."""
        return self._sources.keys()

    def meta(self, name: str) -> Meta:
        """Shape and dtype of one tensor; CheckpointError if missing."""
        return self._source(name).meta(name)

    def load(self, name: str) -> Tensor:
        """One tensor; CheckpointError if missing."""
        return self._source(name).load(name)

    def _source(self, name: str) -> TensorSource:
        if name not in self._sources:
            raise missing_tensor(name, self._sources, "checkpoint")
        return self._sources[name]
