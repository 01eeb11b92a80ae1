"""Linear layers of a few rows with norm, low-rank term and gate, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from reroll.kernels.linear_rows import Linear, Norm, linear_rows, linear_rows_reference
from reroll.rewrite.analysis import tolerances
from tests.conformance.mixer_suite import assert_close
from tests.kernels.inputs import poisoned

TILES = {"BM": 16, "BN": 32, "BK": 32, "num_warps": 4, "num_stages": 1}
K, N, RANK = 72, 50, 6


def layers(count: int, bias: bool, low: bool, dtype: torch.dtype) -> tuple[Linear, ...]:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape).to(dtype)

    return tuple(
        Linear(
            draw(N, K), draw(N) if bias else None,
            *((draw(RANK, K), draw(N, RANK) / 4) if low else (None, None)),
        )
        for _ in range(count)
    )  # fmt: skip


def agree(
    rows: int, norm: Norm | None, layers_: tuple[Linear, ...], activation: str, dtype: torch.dtype
) -> None:
    x = poisoned((3 * torch.randn(rows, K)).to(dtype))
    found = linear_rows(x, norm, layers_, activation, tiles=TILES)
    exact = dtype == torch.float32
    tolerance = tolerances.FORWARD_TRITON_FP32 if exact else tolerances.FORWARD[dtype]
    assert found.dtype == dtype
    assert_close(found, linear_rows_reference(x, norm, layers_, activation), tolerance, "y")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 16, 17])
def test_a_norm_and_a_layer(rows: int, low: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    norm = Norm(torch.randn(K).to(dtype), 1e-5, 1.0)
    agree(rows, norm, layers(1, bias=rows == 7, low=low, dtype=dtype), "", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
def test_a_gated_unit(activation: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = Norm(torch.randn(K).to(dtype), 1e-6)
    agree(3, norm, layers(2, bias=True, low=True, dtype=dtype), activation, dtype)


@pytest.mark.parametrize("norm", [None, Norm(None, 1e-3)])
def test_without_a_gain_or_a_norm(norm: Norm | None) -> None:
    torch.manual_seed(0)
    agree(5, norm, layers(1, bias=False, low=True, dtype=torch.float32), "", torch.float32)
    agree(5, norm, layers(2, bias=False, low=False, dtype=torch.float32), "silu", torch.float32)


def test_rows_of_zeros_and_large_ones() -> None:
    x = torch.stack([torch.zeros(K), torch.full((K,), 1e15), torch.full((K,), 1e-15)])
    norm, (layer,) = Norm(torch.ones(K), 1e-6), layers(1, False, False, torch.float32)
    found = linear_rows(x, norm, (layer,), tiles=TILES)
    assert_close(found, linear_rows_reference(x, norm, (layer,)), 1e-4, "y")
    assert not found[0].any()
