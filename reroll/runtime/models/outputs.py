"""Output classes of lowered models for which transformers has none."""

from __future__ import annotations

from dataclasses import dataclass, field, make_dataclass
from functools import cache

from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput


@dataclass
class DepthOutput(CausalLMOutputWithPast):
    """The outputs of a language model with exits: also the number of trips of each token."""

    depth: Tensor | None = None


@cache
def output_class(names: tuple[str, ...]) -> type[ModelOutput]:
    """Make a `ModelOutput` class with these fields, in order, all optional."""
    fields = [(name, Tensor | None, field(default=None)) for name in names]
    namespace = {"__module__": __name__, "__doc__": f"The outputs {', '.join(names)}."}
    return make_dataclass("RerollOutput", fields, bases=(ModelOutput,), namespace=namespace)
