"""What kernels compute, in PyTorch, for the self-test. This file is copied into bundles."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0) -> Tensor:
    """RMS norm in fp32."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide if weight is None else wide * (weight.float() + offset)).to(x.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotary position embedding of the first channels, as many as `cos` has."""
    size = cos.shape[-1]
    turned, rest = x[..., :size], x[..., size:]
    if interleaved:
        quarter = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
    else:
        first, second = turned.chunk(2, -1)
        quarter = torch.cat((-second, first), -1)
    return torch.cat((turned * cos + quarter * sin, rest), -1).to(x.dtype)


def glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Gated linear unit."""
    if activation == "gelu_tanh":
        return F.gelu(gate, approximate="tanh") * up
    activated: Tensor = getattr(F, activation)(gate)
    return activated * up


def token_by_token(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The definition that the self-test holds the kernels against, in fp32."""
    outs, groups = [], q.shape[1] // k.shape[1]
    for t in range(k.shape[2]):
        key, value = k[:, :, t].float(), v[:, :, t].float()
        if g is not None:
            kept = g[:, :, t].exp()
            state = state * kept.reshape(*kept.shape, *(1 for _ in range(4 - kept.dim())))
        if beta is not None:
            held = torch.einsum("bhk,bhkv->bhv", key, state)
            value = beta[:, :, t, None] * (value - held)
        state = state + key[..., None] * value[..., None, :]
        query = q[:, :, t].float().unflatten(1, (-1, groups))
        outs.append(torch.einsum("bhgk,bhkv->bhgv", query, state).flatten(1, 2))
    return torch.stack(outs, 1), state


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Short convolution of x [rows, channels, time] from its first token on, in fp32."""
    channels, size = weight.shape
    added = None if bias is None else bias.float()
    padded = F.pad(x.float(), (size - 1, 0))
    return F.conv1d(padded, weight.float().unsqueeze(1), added, groups=channels)
