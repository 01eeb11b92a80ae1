"""Confidence without logits, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from reroll.kernels.confidence import confidence, confidence_reference
from tests.kernels.inputs import poisoned

TILES = {"BM": 16, "BN": 32, "BK": 32, "num_warps": 4, "num_stages": 1}


@pytest.mark.parametrize(("rows", "vocabulary", "parts"), [(1, 33, 1), (19, 300, 4), (3, 97, 132)])
@pytest.mark.parametrize("sure", [0.1, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_that_of_the_logits(
    rows: int, vocabulary: int, parts: int, sure: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(vocabulary)
    hidden = poisoned(torch.randn(rows, 40).to(dtype))
    weight = (sure * torch.randn(vocabulary, 40)).to(dtype)
    found = confidence(hidden, weight, TILES, parts)
    wanted = confidence_reference(hidden, weight)
    for name in ("highest", "lead", "entropy"):
        torch.testing.assert_close(
            getattr(found, name), getattr(wanted, name), rtol=1e-4, atol=2e-5, msg=name
        )
    assert torch.equal(found.token, wanted.token)


def test_a_tie_has_no_lead() -> None:
    hidden, weight = torch.ones(1, 16), torch.zeros(70, 16)
    weight[[3, 60]] = 1.0
    found = confidence(hidden, weight, TILES, 3)
    assert found.lead.abs().item() < 1e-6
    assert found.token.item() in (3, 60)
