"""Linear layers with what stands around them. This file is copied into bundles."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from reroll.export.triton.bundle_definitions import glu, rms_norm, rope
from reroll.kernels.pointwise import gated, norm, turned

# with more rows, PyTorch: the kernels would read weights again for each block of rows
ROWS = 16


class Layer(NamedTuple):
    """Weight [N, K], bias [N], down [R, K] and up [N, R]; None where there is none."""

    weight: Tensor
    bias: Tensor | None = None
    down: Tensor | None = None
    up: Tensor | None = None


class Normed:
    """An RMS norm that is computed when it is asked for: not where a kernel does it on the way."""

    def __init__(self, x: Tensor, gain: Tensor | None, eps: float, offset: float = 0.0) -> None:
        self.x, self.gain, self.eps, self.offset = x, gain, eps, offset
        self.known: Tensor | None = None

    def value(self) -> Tensor:
        """The norm, computed once."""
        if self.known is None:
            self.known = norm(self.x, self.gain, self.eps, self.offset)
        return self.known


def launch_linear(kernel: Any, tiles: Any, x: Any, layers: Any, activation: str) -> Tensor:
    """A layer, or two and the unit that they gate; x is a tensor or `Normed`. See the kernel."""
    given = x.x if isinstance(x, Normed) else x
    flat = given.reshape(-1, given.shape[-1]).contiguous()
    if len(flat) > ROWS:
        return by_torch(x, layers, activation)
    (gain, eps, offset) = (x.gain, x.eps, x.offset) if isinstance(x, Normed) else (None, 0.0, 0.0)
    outputs = layers[0].weight.shape[0]
    y = flat.new_empty(len(flat), outputs)
    pointers = (flat if t is None else t for t in (gain, *layers[0], *layers[-1]))
    kernel[(triton.cdiv(outputs, tiles["BN"]), 1)](
        flat, *pointers, y, len(flat), outputs, flat.stride(0), y.stride(0), eps, offset, **tiles
    )
    out: Tensor = y.unflatten(0, given.shape[:-1])
    return out


def by_torch(x: Any, layers: Any, activation: str) -> Tensor:
    """The same with PyTorch's products, for many rows."""
    x = x.value() if isinstance(x, Normed) else x
    outs = []
    for weight, bias, down, up in layers:
        y = F.linear(x, weight, bias)
        outs.append(y if down is None else y + F.linear(F.linear(x, down), up))
    return outs[0] if len(outs) == 1 else gated(outs[0], outs[1], activation)


def linear_error(
    run: Any, about: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> float:
    """How far a kernel is from the definition in fp32, relative, for three rows."""
    draw = _Draw(dtype, device)
    inputs, rank, outputs, activation = about["inputs"], about["rank"], 80, about["activation"]
    layers = [
        Layer(
            draw(outputs, inputs), draw(outputs) if about["bias"] else None,
            *((draw(rank, inputs), draw(outputs, rank)) if rank else (None, None)),
        )
        for _ in range(2 if activation else 1)
    ]  # fmt: skip
    x, gain = draw(3, inputs), draw(inputs) if about["gain"] else None
    found = run(Normed(x, gain, 1e-6, 1.0) if about["norm"] else x, *layers)
    wide, outs = x.float(), []
    if about["norm"]:
        wide = rms_norm(wide, gain, 1e-6, 1.0)
    for weight, bias, down, up in layers:
        y = F.linear(wide, weight.float(), None if bias is None else bias.float())
        if down is not None and up is not None:
            y = y + F.linear(F.linear(wide, down.float()), up.float())
        outs.append(y)
    return _far(found, glu(outs[0], outs[1], activation) if activation else outs[0])


def pointwise_errors(dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """How far the other kernels are from the definitions, relative."""
    draw = _Draw(dtype, device)
    x, gain, cos, sin = draw(2, 3, 5, 48), draw(48), draw(2, 1, 5, 32), draw(2, 1, 5, 32)
    wide = x.float()
    return {
        "norm": _far(norm(x, gain, 1e-6, 1.0), rms_norm(wide, gain, 1e-6, 1.0)),
        "turned": _far(turned(x, cos, sin), rope(wide, cos.float(), sin.float())),
        "gated": _far(gated(x, 2 * x, "silu"), glu(wide, 2 * wide, "silu")),
    }


class _Draw:
    """Random numbers of the size that a sum over the last dimension leaves at one."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.random = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        x: Tensor = torch.randn(*shape, generator=self.random) / shape[-1] ** 0.5
        return x.to(self.device, self.dtype)


def _far(actual: Tensor, wanted: Tensor) -> float:
    return float((actual.float() - wanted).norm() / wanted.norm())
