"""Weight-only quantisation: integers block by block, multiplied by MatMulNBits.

Each row of a matrix [outputs, inputs] is cut into blocks; a block is kept as unsigned integers of 4
or 8 bits with one scale and one zero point. Activations stay floating.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from reroll.export.onnx.graph import Value
from reroll.export.onnx.parameters import Parameter

if TYPE_CHECKING:
    from reroll.export.onnx.translate import Translator


def applies(g: Translator, weight: Parameter) -> bool:
    """Whether a weight is to be quantised."""
    return False


def matmul(g: Translator, node: fx.Node, x: Value, weight: Parameter) -> Value:
    """The product with a quantised matrix."""
    raise NotImplementedError
