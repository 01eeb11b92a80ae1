"""What the shims of the interpreter mend: without them these fail."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from reroll.rewrite.analysis.tolerances import relative_rms


@triton.jit
def _product(a, b, c, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    found = tl.dot(tl.load(a + at), tl.load(b + at))
    tl.store(c + at, found)


@triton.jit
def _narrowed(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(x + i).to(tl.bfloat16))


def test_products_of_bf16() -> None:
    a, b = torch.randn(2, 16, 16).bfloat16()
    c = torch.empty(16, 16)
    _product[(1,)](a, b, c, 16)
    assert relative_rms(c, a.float() @ b.float()) < 1e-6


def test_rounding_to_bf16() -> None:
    x = torch.cat([torch.randn(1000), torch.tensor([1e-40, 3e38, float("inf"), -0.0]),
                   (torch.arange(20) * 2**-9 + 1)])  # fmt: skip
    y = torch.empty(1024, dtype=torch.bfloat16)
    _narrowed[(1,)](x, y, 1024)
    assert torch.equal(y, x.bfloat16())


def test_what_is_not_a_number_stays_so() -> None:
    y = torch.empty(16, dtype=torch.bfloat16)
    _narrowed[(1,)](torch.full((16,), float("nan")), y, 16)
    assert y.isnan().all()
