from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reroll.rewrite.analysis import tolerances
from reroll.rewrite.analysis.tolerances import relative_rms


@given(st.integers(1, 50), st.floats(1e-8, 10))
def test_it_is_the_norm_of_the_difference_over_the_norm(size, amount):
    generator = torch.Generator().manual_seed(size)
    b = torch.randn(size, dtype=torch.float64, generator=generator)
    d = torch.randn(size, dtype=torch.float64, generator=generator) * amount
    assert relative_rms(b + d, b) == pytest.approx((d.norm() / b.norm()).item(), rel=1e-6)


def test_large_tensors_are_taken_in_pieces(monkeypatch):
    monkeypatch.setattr(tolerances, "_PIECE", 7)
    a, b = torch.randn(5, 20), torch.randn(5, 20)
    assert relative_rms(a, b) == pytest.approx(((a - b).norm() / b.norm()).item(), rel=1e-5)


def test_what_is_equally_infinite_is_no_difference():
    low = -math.inf
    a, b = torch.tensor([low, 1.0, math.nan]), torch.tensor([low, 2.0, math.nan])
    assert relative_rms(a, b) == 0.5
    assert relative_rms(torch.tensor([low, 1.0]), torch.tensor([0.0, 1.0])) == math.inf
    assert relative_rms(torch.tensor([math.nan, 1.0]), torch.tensor([0.0, 1.0])) == math.inf


def test_edges():
    assert relative_rms(torch.zeros(3), torch.zeros(3)) == 0
    assert relative_rms(torch.ones(3), torch.zeros(3)) == math.inf
    assert relative_rms(torch.ones(3), torch.ones(4)) == math.inf
    assert relative_rms(torch.ones(0), torch.ones(0)) == 0
    assert relative_rms(torch.tensor([1, 2]), torch.tensor([1, 2])) == 0


def test_wider_dtypes_have_smaller_tolerances():
    order = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
    for table in (tolerances.FORWARD, tolerances.ROLLED):
        assert sorted(order, key=table.__getitem__) == order
