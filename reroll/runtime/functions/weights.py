"""Weights that the code of a model reads itself, such as those of norms.

A library that keeps weights elsewhere (accelerate's offloading, FSDP, DeepSpeed) brings those of a
module back when the module is called. So a weight is read by calling the module that holds it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def read(module: nn.Module, name: str) -> Tensor:
    """Return a weight of a module by its name, calling the module where it gives its weights.

    Of an adapter, the weight is that of the layer inside it. A module that was put in the place of
    one that gives its weights is not called.
    """
    if getattr(module, "gives_weights", False):
        return module(name)  # type: ignore[no-any-return]
    inner = getattr(module, "base_layer", None)
    tensor: Tensor = getattr(module, name) if inner is None else read(inner, name)
    return tensor


class Scope(nn.Module):
    """A module that holds weights and other modules; calling it with a name gives that weight."""

    gives_weights = True
    # transformers reads this attribute of every module that is named `encoder`
    main_input_name = "input_ids"

    def forward(self, name: str) -> Tensor:
        """Return the weight of this name."""
        tensor: Tensor = getattr(self, name)
        return tensor


class ReadLinear(nn.Linear):
    """An `nn.Linear` whose weights the code of the model also reads itself."""

    gives_weights = True

    def forward(self, x: Any) -> Tensor:
        """Multiply by the weight, or return the weight of the name `x`."""
        return getattr(self, x) if isinstance(x, str) else super().forward(x)


class ScaledEmbedding(nn.Embedding):
    """An `nn.Embedding` that multiplies the rows by `embed_scale`, a number or a tensor.

    With `converted`, the tensor is converted to the rows' dtype before. peft scales what an adapter
    adds by the attribute of this name.
    """

    gives_weights = True
    embed_scale: Any
    converted = False

    def forward(self, x: Any) -> Tensor:
        """Look up the rows `x`, or return the weight of the name `x`."""
        if isinstance(x, str):
            return getattr(self, x)  # type: ignore[no-any-return]
        rows = super().forward(x)
        scale = self.embed_scale.to(rows.dtype) if self.converted else self.embed_scale
        scaled: Tensor = rows * scale
        return scaled


class ReadEmbedding(nn.Embedding):
    """An `nn.Embedding` whose table the code of the model also reads itself."""

    gives_weights = True

    def forward(self, x: Any) -> Tensor:
        """Look up the rows `x`, or return the weight of the name `x`."""
        return getattr(self, x) if isinstance(x, str) else super().forward(x)
