"""Lower products with quantised weights, and look-ups in them, to ONNX Runtime's operators."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from reroll.export.onnx.graph import Value
from reroll.export.onnx.ops.arguments import Parameter

if TYPE_CHECKING:
    from reroll.export.onnx.emit.translate import Translator

CONTRIB = "com.microsoft"

# inputs are rounded to 8 bits by block; 0 keeps them in fp32
ACCURACY = 4


def matmul(g: Translator, x: Value, weight: Parameter) -> Value:
    """Multiply by a quantised matrix."""
    outputs, inputs = weight.shape
    packed = weight.read.initializers[0]
    return g.op(
        "MatMulNBits",
        g.cast(x, torch.float32),
        *weight.tensors(),
        domain=CONTRIB,
        K=inputs,
        N=outputs,
        bits=packed.form.shape[-1] * 8 // g.settings.block,
        block_size=g.settings.block,
        accuracy_level=ACCURACY,
    )


def look_up(g: Translator, weight: Parameter, ids: Value) -> Value:
    """Look up rows of a quantised table."""
    packed, scales, zeros = weight.tensors()
    return g.op(
        "GatherBlockQuantized",
        packed,
        ids,
        scales,
        zeros,
        domain=CONTRIB,
        dtype=torch.float32,
        bits=8,
        block_size=g.settings.block,
        gather_axis=0,
        quantize_axis=1,
    )
