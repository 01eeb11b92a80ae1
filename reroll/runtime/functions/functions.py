"""The PyTorch functions and methods that the ops of a graph become in the lowered module.

An op that is not in these tables is called as its ATen operator, which gives the same result with a
few microseconds more of dispatch.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reroll.rewrite.ir.matching import bind
from reroll.rewrite.ir.ops import (
    ABSENT,
    EXIT,
    EXIT_LINEAR,
    GLU,
    HOLD,
    MARK_KEYS,
    MASK,
    RMS_NORM,
    ROPE,
    WIDEN,
    activate,
)
from reroll.rewrite.ir.visibility import Visibility, additive
from reroll.runtime.functions.documents import Documents

aten = torch.ops.aten


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0) -> Tensor:
    """Compute `reroll.rms_norm` with the fused kernel, in fp32 for narrower dtypes."""
    if x.dtype == torch.float32:
        if weight is not None and offset:
            weight = weight + offset
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    wide = weight
    if weight is not None:
        wide = weight.float() + offset if offset else weight.float()
    return F.rms_norm(x.float(), x.shape[-1:], wide, eps).to(x.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Compute `reroll.rope` in few operations."""
    size = cos.shape[-1]
    turned, rest = (x, None) if size == x.shape[-1] else (x[..., :size], x[..., size:])
    if interleaved:
        quarter = torch.stack((-turned[..., 1::2], turned[..., ::2]), dim=-1).flatten(-2)
    else:
        first, second = turned.chunk(2, -1)
        quarter = torch.cat((-second, first), -1)
    turned = torch.addcmul(turned * cos, quarter, sin)
    return turned if rest is None else torch.cat((turned, rest), -1)


def glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Compute `reroll.glu`."""
    return activate(gate, activation) * up


def layer_norm(
    x: Tensor,
    shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """Compute `aten.layer_norm`, ignoring its cuDNN switch."""
    del cudnn_enable
    return F.layer_norm(x, shape, weight, bias, eps)


def slice_(
    x: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Tensor:
    """Compute `aten.slice` by indexing."""
    if dim == -1 or dim == x.dim() - 1:
        return x[..., start:end:step]
    return x[(slice(None),) * (dim % x.dim()) + (slice(start, end, step),)]


def copy(old: Tensor, new: Tensor, non_blocking: bool = False) -> Tensor:
    """Compute `aten.copy`, which has no derivative: `new` in the shape and dtype of `old`."""
    return new.to(old.dtype).expand_as(old)


def embedding(
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Compute `aten.embedding` with the argument order of `torch.nn.functional`."""
    del padding_idx
    return F.embedding(indices, weight, None, None, 2.0, scale_grad_by_freq, sparse)


def exit_(done: Tensor, score: Tensor, threshold: float) -> Tensor:
    """Compute `reroll.exit` without the dispatch of a custom op."""
    return done | (score > threshold)


def hold(done: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """Compute `reroll.hold` so that gradients flow through it."""
    return torch.where(done[..., None], old, new)


def mark_keys(k: Tensor, absent: Tensor) -> Tensor:
    """Compute `reroll.mark_keys` so that gradients flow through it."""
    mark = (absent.to(k.dtype) * ABSENT)[:, None, :, None]
    return torch.cat((k, mark.expand(-1, k.shape[1], -1, -1)), -1)


def exit_linear(
    x: Tensor,
    depth: Tensor,
    stops: Sequence[int],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
) -> Tensor:
    """Compute `reroll.exit_linear` with one matrix product for each token.

    In a compiled graph, which cannot depend on values, every head is computed for every token.
    """
    heads = [(w, biases[n] if biases else None) for n, w in enumerate(weights)]
    exit_number = torch.zeros_like(depth)
    for number, stop in enumerate(stops, 1):
        exit_number = torch.where(depth == stop, number, exit_number)
    if torch.compiler.is_compiling():
        out = F.linear(x, *heads[0])
        for number, head in enumerate(heads[1:], 1):
            out = torch.where((exit_number == number)[..., None], F.linear(x, *head), out)
        return out
    used = exit_number.unique().tolist()
    if len(used) == 1:
        return F.linear(x, *heads[used[0]])
    out = x.new_zeros(*x.shape[:-1], weights[0].shape[0])
    for number in used:
        here = exit_number == number
        out[here] = F.linear(x[here], *heads[number])
    return out


def mask(padding: Tensor | Documents | None, *args: Any, **kwargs: Any) -> Tensor:
    """Compute `reroll.mask` for explicit attention, from padding or packed documents."""
    if not isinstance(padding, Documents):
        return torch.ops.reroll.mask(padding, *args, **kwargs)  # type: ignore[no-any-return]
    arguments = bind(MASK, (padding, *args), kwargs)
    if not arguments["causal"]:
        return torch.ops.reroll.mask(None, *args, **kwargs)  # type: ignore[no-any-return]
    visible = padding.visible(Visibility.among(arguments))
    return additive(visible, arguments["dtype"])


FUNCTIONS: dict[Any, Callable[..., Any]] = {
    MASK: mask,
    EXIT: exit_,
    HOLD: hold,
    MARK_KEYS: mark_keys,
    EXIT_LINEAR: exit_linear,
    RMS_NORM: rms_norm,
    ROPE: rope,
    GLU: glu,
    aten.layer_norm.default: layer_norm,
    aten.slice.Tensor: slice_,
    aten.copy.default: copy,
    aten.embedding.default: embedding,
    aten.linear.default: F.linear,
    aten.neg.default: operator.neg,
    aten.matmul.default: torch.matmul,
    aten.bmm.default: torch.bmm,
    aten.cat.default: torch.cat,
    aten.stack.default: torch.stack,
    aten.cos.default: torch.cos,
    aten.sin.default: torch.sin,
    aten.tanh.default: torch.tanh,
    aten.sigmoid.default: torch.sigmoid,
    aten.exp.default: torch.exp,
    aten.rsqrt.default: torch.rsqrt,
    aten.relu.default: torch.relu,
    aten.silu.default: F.silu,
    aten.gelu.default: F.gelu,
    aten.softmax.int: torch.softmax,
    aten.pow.Tensor_Scalar: torch.pow,
    aten.mean.dim: torch.mean,
    aten.where.self: torch.where,
    aten.unflatten.int: torch.unflatten,
    aten.flatten.using_ints: torch.flatten,
    aten.conv1d.default: F.conv1d,
    aten.conv2d.default: F.conv2d,
}

# used for two plain operands only: calls with an alpha or a rounding mode stay ATen calls
BINARY: dict[Any, Callable[..., Any]] = {
    aten.add.Tensor: operator.add,
    aten.sub.Tensor: operator.sub,
    aten.mul.Tensor: operator.mul,
    aten.div.Tensor: operator.truediv,
    aten.add.Scalar: operator.add,
    aten.mul.Scalar: operator.mul,
    aten.div.Scalar: operator.truediv,
}

METHODS: dict[Any, str] = {
    aten.reshape.default: "reshape",
    aten.view.default: "reshape",
    aten.transpose.int: "transpose",
    aten.permute.default: "permute",
    aten.unsqueeze.default: "unsqueeze",
    aten.squeeze.dim: "squeeze",
    aten.expand.default: "expand",
    aten.select.int: "select",
    aten.sym_size.int: "size",
    aten.to.dtype: "to",
    WIDEN: "float",
    aten.t.default: "t",
}


def makes_tensor_from_nothing(target: Any) -> bool:
    """Whether an op makes a tensor from no tensor argument, so that it has to be given a device."""
    schema = getattr(target, "_schema", None)
    if schema is None or not any(a.name == "device" for a in schema.arguments):
        return False
    return not any("Tensor" in str(a.type) for a in schema.arguments)
