"""`attend` beside the reference of the attention op, in value and gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reroll.rewrite.ir.ops import attention
from reroll.rewrite.ir.visibility import Visibility
from reroll.runtime.functions.attention import attend, mass
from reroll.runtime.functions.bands import Band
from reroll.runtime.functions.masks import make_mask, visible_tokens

SCALE = 0.3


def tensors(length: int, keys: int, groups: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [(2, 2 * groups, length, 8), (2, 2, keys, 8), (2, 2, keys, 4)]
    return tuple(torch.randn(*size, generator=generator) for size in sizes)  # type: ignore[return-value]


def both(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The reference's result and `attend`'s, for the arguments of the attention op."""
    masked = {n: options.get(n) for n in ("padding", "blocks", "window", "chunk")}
    causal = options.get("causal", False)
    limits = Visibility.among({**masked, "causal": causal})
    limits = replace(limits, padding=visible_tokens(limits.padding))
    mask = make_mask(None, q, q.shape[2], k.shape[2], *limits.values())
    rest = {n: options.get(n) for n in ("softcap", "sinks", "bias")}
    # the body of the op: through the op itself no gradient flows
    expected = attention._init_fn(q, k, v, SCALE, causal, **masked, **rest)
    return expected, attend(q, k, v, SCALE, causal, mask, **rest)


@settings(max_examples=120, deadline=None)
@given(
    length=st.integers(1, 9),
    past=st.integers(0, 7),
    groups=st.sampled_from([1, 3]),
    causal=st.booleans(),
    window=st.sampled_from([None, 1, 4, 30]),
    chunk=st.sampled_from([None, 3]),
    padded=st.booleans(),
    blocks=st.booleans(),
    softcap=st.sampled_from([None, 5.0]),
    sinks=st.booleans(),
    bias=st.booleans(),
)
def test_it_is_the_reference(
    length: int,
    past: int,
    groups: int,
    causal: bool,
    window: int | None,
    chunk: int | None,
    padded: bool,
    blocks: bool,
    softcap: float | None,
    sinks: bool,
    bias: bool,
) -> None:
    keys = length + past
    q, k, v = tensors(length, keys, groups)
    padding = torch.ones(2, keys, dtype=torch.bool)
    # row 1 starts with padding, and every query still sees itself
    padding[1, : min(2, past)] = False
    options: dict[str, Any] = {
        "causal": causal,
        "window": window,
        "chunk": chunk,
        "padding": padding if padded else None,
        "blocks": torch.arange(keys).div(3, rounding_mode="floor").expand(2, -1)
        if blocks
        else None,
        "softcap": softcap,
        "sinks": torch.randn(2 * groups) if sinks else None,
        "bias": torch.randn(1, 2 * groups, length, keys) if bias else None,
    }
    expected, actual = both(q, k, v, **options)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"bias": True}, {"window": 3}])
def test_gradients(options: dict[str, Any]) -> None:
    if "bias" in options:
        options = {"bias": torch.randn(1, 6, 7, 7)}
    grads = []
    for number in (0, 1):
        inputs = [t.requires_grad_() for t in tensors(7, 7, 3)]
        out = both(*inputs, causal=True, **options)[number]
        grads.append(torch.autograd.grad(out.sin().sum(), inputs))
    for expected, actual in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"bias": torch.zeros(1, 2, 5, 5)}])
def test_a_row_that_sees_nothing_is_finite(options: dict[str, Any]) -> None:
    q, k, v = (t.requires_grad_() for t in tensors(5, 5, 1))
    padding = torch.ones(2, 5, dtype=torch.bool)
    padding[0, :3] = False
    _, out = both(q, k, v, causal=True, padding=padding, **options)
    out.sum().backward()
    for tensor in (out, q.grad, k.grad, v.grad):
        assert tensor is not None
        assert tensor.isfinite().all()


def test_long_explicit_attention_is_computed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tensors(11, 11, 3)
    bias = torch.randn(1, 6, 11, 11)
    whole = both(q, k, v, causal=True, window=4, softcap=5.0, bias=bias)[1]
    monkeypatch.setattr("reroll.runtime.functions.attention._QUERY_BLOCK", 4)
    blocks = both(q, k, v, causal=True, window=4, softcap=5.0, bias=bias)[1]
    torch.testing.assert_close(blocks, whole)


@pytest.mark.parametrize("causal", [True, False])
def test_no_mask_is_made_where_none_is_needed(causal: bool) -> None:
    like = torch.zeros(1)
    ones = torch.ones(2, 6, dtype=torch.long)
    padding = visible_tokens(ones)
    assert padding is None
    assert make_mask(None, like, 6, 6, causal, None, None, padding) is None
    assert make_mask(None, like, 6, 6, causal, 6, 6, padding) is None
    assert make_mask(None, like, 6, 6, causal, 3, None, padding) is not None


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(128, 300),
    window=st.integers(0, 40),
    prefix=st.integers(0, 5),
    groups=st.sampled_from([1, 3]),
)
def test_a_window_over_a_long_sequence_needs_no_mask_of_all_pairs(
    length: int, window: int, prefix: int, groups: int
) -> None:
    if window + prefix == 0:
        return
    limits = Visibility(causal=True, window=window, prefix=prefix)
    mask = make_mask(None, torch.empty(0), length, length, *limits.values())
    assert isinstance(mask, Band) == (length >= 4 * max(window, 32))
    written = mask.written_out(torch.device("cpu")) if isinstance(mask, Band) else mask
    q, k, v = (t.requires_grad_() for t in tensors(length, length, groups))
    weights = torch.randn(2, length, 2 * groups, 4)
    found = []
    for each in (mask, written):
        out = attend(q, k, v, SCALE, True, each)
        out = out / (1 + mass(q, k, SCALE, True, each)[..., None])
        found.append((out, *torch.autograd.grad((out * weights).sum(), (q, k, v))))
    for banded, whole in zip(*found, strict=True):
        torch.testing.assert_close(banded, whole, rtol=1e-4, atol=1e-5)


def test_a_band_is_the_window_of_the_op() -> None:
    q, k, v = tensors(200, 200, 1)
    expected, banded = both(q, k, v, causal=True, window=17)
    torch.testing.assert_close(banded, expected)
