"""Attention over a window with sinks, alone and beside a linear branch, in the interpreter."""

from __future__ import annotations

import pytest
import torch

from reroll.kernels.window import window_attention, window_reference
from reroll.rewrite.analysis import tolerances
from reroll.rewrite.ir import ops
from tests.conformance.mixer_suite import assert_close
from tests.kernels.inputs import poisoned

TILES = {"BM": 16, "BN": 16, "num_warps": 4, "num_stages": 1}


def draw(time: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(time)
    return [poisoned(torch.randn(2, h, time, d).to(dtype)) for h, d in ((3, 24), (1, 24), (1, 20))]


@pytest.mark.parametrize("time", [1, 7, 16, 17, 70])
@pytest.mark.parametrize(("window", "prefix"), [(5, 0), (20, 4), (16, 18), (200, 4)])
def test_it_is_the_reference_at_any_length(time: int, window: int, prefix: int) -> None:
    q, k, v = draw(time)
    found = window_attention(q, k, v, 0.2, window, prefix, tiles=TILES)
    wanted = window_reference(q, k, v, 0.2, window, prefix)
    assert_close(found, wanted, tolerances.FORWARD_TRITON_FP32, "out")


def test_the_reference_is_the_op() -> None:
    q, k, v = draw(30)
    padding = torch.ones(2, 30)
    padding[1, :6] = 0
    wanted = ops.attention(q, k, v, 0.2, causal=True, window=7, prefix=3, padding=padding)
    first = torch.tensor([0, 6])
    for form in (window_reference, lambda *x: window_attention(*x, tiles=TILES)):
        found = form(q, k, v, 0.2, 7, 3, None, first)
        assert_close(found[padding.bool()], wanted[padding.bool()], 1e-5, "out")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_branch_under_one_normaliser(dtype: torch.dtype) -> None:
    """LoLCATs' joint form: weights of far tokens are features, those of near ones exponentials."""
    q, k, v = draw(60, dtype)
    window, prefix, gain = 20, 4, 0.5
    fq, fk = (x.float().softmax(-1).repeat_interleave(n, 1) for x, n in ((q, 1), (k, 3)))
    column = torch.arange(60)
    behind = (column[None, :] <= column[:, None] - window) & (column >= prefix)[None, :]
    weights = gain * (fq @ fk.mT).masked_fill(~behind, 0.0)
    ones = torch.cat([v.float(), torch.ones_like(v[..., :1]).float()], -1)
    far = (weights @ ones.repeat_interleave(3, 1)).transpose(1, 2).contiguous()
    found = window_attention(q, k, v, 0.2, window, prefix, far, tiles=TILES)
    exact = dtype == torch.float32
    tolerance = tolerances.FORWARD_TRITON_FP32 if exact else tolerances.FORWARD[dtype]
    assert_close(found, window_reference(q, k, v, 0.2, window, prefix, far), tolerance, "out")
    # by the definition of the joint form, all weights of a token in one sum
    scores = q.float() @ k.float().repeat_interleave(3, 1).mT * 0.2
    near = (column[None, :] <= column[:, None]) & ~behind
    every = scores.exp().masked_fill(~near, 0.0) + weights
    wanted = every / every.sum(-1, keepdim=True) @ v.float().repeat_interleave(3, 1)
    assert_close(found.float(), wanted.transpose(1, 2), tolerance, "out by definition")
