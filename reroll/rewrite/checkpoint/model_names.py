"""State-dict names of a transformers model, and which of them a checkpoint can fill."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from typing import TYPE_CHECKING

import torch

from reroll.errors import CheckpointError
from reroll.rewrite.ir.weights.expressions import Meta
from reroll.rewrite.ir.weights.sources import missing_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ModelNames:
    """State-dict names of a model (its parameters may be on the meta device), and its ties."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
        ties: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
        self._partners: dict[str, set[str]] = {}
        for target, source in ties.items():
            group = self._partners.get(source, {source}) | self._partners.get(target, {target})
            self._partners.update(dict.fromkeys(group, group))

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def is_beyond(self, name: str) -> bool:
        """Whether `name` would be a tensor of the model if one of its numbers were 0."""
        numbers = re.finditer(r"(?<=\.)\d+(?=\.)", name)
        return any(f"{name[: m.start()]}0{name[m.end() :]}" in self for m in numbers)

    def available(self, stored: Container[str]) -> list[str]:
        """Return the model's names that a checkpoint with the names ``stored`` can fill."""
        return [n for n in self._shapes if n in stored or self._tied(n, stored) is not None]

    def resolve(self, name: str, stored: Mapping[str, object], where: str) -> str:
        """Return the name to read ``name`` from: itself, or the name that it is tied to.

        Raises CheckpointError if the checkpoint has neither.
        """
        resolved = name if name in stored else self._tied(name, stored)
        if resolved is None:
            raise missing_tensor(name, stored, where)
        return resolved

    def meta(self, name: str, dtype: torch.dtype) -> Meta:
        """Return the Meta of the shape in the model and a dtype."""
        return Meta(self._shapes[name], dtype)

    def check(self, name: str, meta: Meta, where: str) -> None:
        """Raise CheckpointError unless a tensor has the shape in the model."""
        if meta.shape != self._shapes.get(name, meta.shape):
            raise CheckpointError(
                f"{name!r} is {meta} in the checkpoint, but the model needs "
                f"{list(self._shapes[name])}",
                where=where,
                hint="make the model from the checkpoint's own configuration",
            )

    def _tied(self, name: str, stored: Container[str]) -> str | None:
        return next((n for n in sorted(self._partners.get(name, ())) if n in stored), None)
