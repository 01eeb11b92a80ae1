"""RMS norm, rotary embedding and gated units in the interpreter, against the ops of a program."""

from __future__ import annotations

import pytest
import torch

from reroll.kernels.pointwise import gated, norm, turned
from reroll.rewrite.analysis import tolerances
from tests.conformance.mixer_suite import assert_close
from tests.kernels.inputs import poisoned

ops = torch.ops.reroll
NUMBERS = [torch.float32, torch.bfloat16]


def agree(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    exact = dtype == torch.float32
    assert found.dtype == dtype
    tolerance = tolerances.FORWARD_TRITON_FP32 if exact else tolerances.FORWARD[dtype]
    assert_close(found, wanted, tolerance, "y")


@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 40), (3, 7, 65)])
def test_a_norm(shape: tuple[int, ...], gain: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = poisoned((4 * torch.randn(shape)).to(dtype))
    weight = torch.randn(shape[-1]).to(dtype) if gain else None
    wanted = ops.rms_norm(x.float(), None if weight is None else weight.float(), 1e-5, 1.0)
    agree(norm(x, weight, 1e-5, 1.0), wanted, dtype)


@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("width", "size"), [(16, 16), (20, 12), (6, 2)])
def test_a_rotation(width: int, size: int, interleaved: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = poisoned(torch.randn(2, 9, 3, width).to(dtype)).transpose(1, 2)
    # cos and sin of a row each, and of all rows
    for rows in (2, 1):
        cos, sin = (torch.randn(rows, 1, 9, size) for _ in range(2))
        wanted = ops.rope(x.float(), cos, sin, interleaved)
        agree(turned(x, cos, sin, interleaved), wanted, dtype)


@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
def test_a_gate(activation: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gate, up = (poisoned((3 * torch.randn(5, 300)).to(dtype)) for _ in range(2))
    agree(gated(gate, up, activation), ops.glu(gate.float(), up.float(), activation), dtype)
