"""What generated code calls in place of ATen's operators."""

from __future__ import annotations

import torch

from reroll.runtime.functions.functions import FUNCTIONS

aten = torch.ops.aten


def test_a_copy_has_a_gradient() -> None:
    old = torch.zeros(2, 3, dtype=torch.float64)
    new = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    result = FUNCTIONS[aten.copy.default](old, new)
    assert torch.equal(result, aten.copy(old, new.detach()))
    assert result.dtype == old.dtype
    result.sum().backward()
    assert torch.equal(new.grad, torch.full((3,), 2.0))
