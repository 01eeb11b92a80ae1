"""Products of few rows on a processor: as fast as its memory allows, for verification and drafts.

PyTorch computes `x @ W^T` for 2 to 16 rows at up to three times the cost of one row, although the
weights, which bound it, are read once (measured in docs/results/speculation.md). `FewRows` computes
`W @ x^T` in fp32, and half precision in blocks of the weights converted to fp32, while it is on. It
rounds otherwise, so nothing but speculation turns it on.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# rows for which the other form is faster: beyond, only for matrices of many outputs
_FEW, _MOST = 6, 16
_MANY_OUTPUTS = 8192
# numbers of a block of converted weights, which stay in the processor's cache
_BLOCK = 1 << 18


class FewRows(TorchFunctionMode):
    """Computes linear layers of 2 to 16 rows so that they cost little more than one row."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear and not kwargs and len(args) >= 2 and _is_few(args[0], args[1]):
            x, weight, bias = (*args, None)[:3]
            return few_rows(x, weight, bias)
        return func(*args, **(kwargs or {}))


def few_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `x @ weight^T + bias` for x [..., in] of few rows and `weight` [out, in]."""
    columns = x.reshape(-1, x.shape[-1]).t()
    out = torch.mm(weight, columns) if x.dtype is torch.float32 else _in_blocks(weight, columns)
    out = out.t() if bias is None else out.t() + bias
    return out.to(x.dtype).reshape(*x.shape[:-1], -1)


def _in_blocks(weight: Tensor, columns: Tensor) -> Tensor:
    """Return the product in fp32, of weights that are converted block by block."""
    columns, size = columns.float(), max(_BLOCK // weight.shape[1], 1)
    out = columns.new_empty(weight.shape[0], columns.shape[1])
    for part, block in zip(out.split(size), weight.split(size), strict=True):
        torch.mm(block.float(), columns, out=part)
    return out


def _is_few(x: Tensor, weight: Tensor) -> bool:
    rows = x.numel() // x.shape[-1] if x.numel() else 0
    if not 2 <= rows <= _MOST or weight.device.type != "cpu" or weight.dtype is not x.dtype:
        return False
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return False
    if x.dtype is torch.float32:
        return rows <= _FEW or weight.shape[0] >= _MANY_OUTPUTS
    return x.dtype is torch.bfloat16 and rows >= _FEW


class Int8Linear(nn.Module):
    """A linear layer with weights in int8, and inputs that are quantized at each call.

    One scale for each output, and one for each call's inputs. PyTorch's dynamically quantized layer
    computes it, on a processor: a step reads a quarter of fp32's bytes, and a few rows cost no more
    than one.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        # zero rows have scale 1
        scales = weight.abs().amax(1).double() / 127
        scales = torch.where(scales > 0, scales, torch.ones_like(scales))
        zeros = torch.zeros(len(scales), dtype=torch.long)
        with warnings.catch_warnings():
            # announced as deprecated; what takes its place has no fast product for a processor yet
            warnings.simplefilter("ignore", UserWarning)
            quantized = torch.quantize_per_channel(weight.cpu(), scales, zeros, 0, torch.qint8)
        bias = None if linear.bias is None else linear.bias.detach().float()
        self.packed = torch.ops.quantized.linear_prepack(quantized, bias)
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        # inputs of 7 bits: with 8, sums of two products overflow on processors without VNNI
        out: Tensor = torch.ops.quantized.linear_dynamic(x.float().contiguous(), self.packed, True)
        return out.to(x.dtype)


def to_int8(module: nn.Module) -> nn.Module:
    """Replace every linear layer of a lowered module by one in int8, in place, and return it.

    A layer that several places share stays one. What is not a linear layer, such as embeddings,
    stays as it is.
    """
    known: dict[int, Int8Linear] = {}
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                key = id(child.weight)
                if key not in known:
                    known[key] = Int8Linear(child)
                setattr(parent, name, known[key])
    return module
