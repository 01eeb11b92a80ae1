"""Output classes of lowered models for which transformers has none."""

from __future__ import annotations

from dataclasses import field, make_dataclass
from functools import cache

from torch import Tensor
from transformers.utils import ModelOutput


@cache
def output_class(names: tuple[str, ...]) -> type[ModelOutput]:
    """Make a `ModelOutput` class with these fields, in order, all optional."""
    fields = [(name, Tensor | None, field(default=None)) for name in names]
    namespace = {"__module__": __name__, "__doc__": f"The outputs {', '.join(names)}."}
    return make_dataclass("RerollOutput", fields, bases=(ModelOutput,), namespace=namespace)
