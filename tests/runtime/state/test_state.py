"""Masks and attention over transformers' cache layers: any split of a sequence gives the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from reroll.errors import UsageError
from reroll.rewrite.analysis.state_plan import CacheLayer
from reroll.rewrite.ir.ops import attention
from reroll.runtime.functions.attention import attend
from reroll.runtime.functions.masks import make_mask, visible_tokens
from reroll.runtime.models.config import RerollConfig
from reroll.runtime.state.caches import cache_config, layers_of
from reroll.runtime.state.growing import GrowingLayer
from tests import captured

KINDS = [
    CacheLayer("full_attention"),
    CacheLayer("sliding_attention", 4),
    CacheLayer("chunked_attention", 4),
    CacheLayer("sliding_attention", 4, prefix=2),
    CacheLayer("sliding_attention", 1, prefix=1),
]


def cache_of(layer: CacheLayer, static: int | None) -> Any:
    config = RerollConfig(**cache_config([layer]))
    return DynamicCache(config=config) if static is None else StaticCache(config, static)


def in_parts(
    splits: list[int], layer: CacheLayer, padding: Tensor | None, static: int | None
) -> tuple[Tensor, Tensor]:
    """Attention of a sequence as a whole by the reference, and part by part through a cache."""
    total = sum(splits)
    generator = torch.Generator().manual_seed(total)
    q = torch.randn(2, 6, total, 8, generator=generator)
    k, v = torch.randn(2, 2, 2, total, 8, generator=generator)
    window = layer.size if layer.layer_type == "sliding_attention" else None
    chunk = layer.size if layer.layer_type == "chunked_attention" else None
    prefix = layer.prefix or None
    expected = attention(q, k, v, 0.3, True, window, chunk, padding=padding, prefix=prefix)
    (own,) = layers_of(cache_of(layer, static), [layer]) or []
    done, parts = 0, []
    for length in splits:
        now = slice(done, done + length)
        done += length
        seen = visible_tokens(padding[:, :done]) if padding is not None else None
        mask = make_mask(own, q, length, None, True, window, chunk, seen, None, prefix)
        told = {"padding": seen} if prefix else {}
        keys, values = own.update(k[:, :, now], v[:, :, now], **told)
        parts.append(attend(q[:, :, now], keys, values, 0.3, True, mask))
    return expected, torch.cat(parts, dim=1)


@settings(max_examples=100, deadline=None)
@given(
    splits=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    layer=st.sampled_from(KINDS),
    padded=st.booleans(),
    static=st.booleans(),
)
def test_any_split_of_a_sequence(
    splits: list[int], layer: CacheLayer, padded: bool, static: bool
) -> None:
    total = sum(splits)
    padding = None
    if padded:
        padding = torch.ones(2, total, dtype=torch.bool)
        padding[0, : min(3, total - 1)] = False
    expected, actual = in_parts(splits, layer, padding, total + 3 if static else None)
    kept = torch.ones(2, total, dtype=torch.bool) if padding is None else padding
    torch.testing.assert_close(actual[kept], expected[kept])


def test_the_configuration_makes_the_layers_of_the_program() -> None:
    model = captured.captured("gemma3").to_module(meta=True)
    cache = DynamicCache(config=model.config)
    assert [layer.is_sliding for layer in cache.layers] == [True, False, True, False]
    assert cache.layers[0].sliding_window == 8


def test_layers_with_windows_of_different_sizes() -> None:
    plan = [CacheLayer("sliding_attention", n, 2, 8) for n in (4, 6, 4)]
    cache = DynamicCache(config=RerollConfig(**cache_config(plan)))
    assert [layer.sliding_window for layer in cache.layers] == [4, 6, 4]


def test_a_cache_for_another_model_is_refused() -> None:
    cache = DynamicCache(config=RerollConfig(**cache_config(KINDS[:1])))
    with pytest.raises(UsageError, match="1 layers, and the model needs 4"):
        layers_of(cache, KINDS[:1] * 4)


class TestGrowingLayer:
    def steps(self, layer: Any, lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        for length in lengths:
            k, v = torch.randn(2, 3, 2, length, 4, generator=generator)
            out = layer.update(k, v)
        return out

    @given(st.lists(st.integers(1, 200), min_size=1, max_size=6))
    @settings(max_examples=30, deadline=None)
    def test_it_holds_what_a_dynamic_layer_holds(self, lengths: list[int]) -> None:
        expected = self.steps(DynamicLayer(), lengths)
        actual = self.steps(GrowingLayer(), lengths)
        assert torch.equal(actual[0], expected[0])
        assert torch.equal(actual[1], expected[1])

    def test_a_token_is_written_in_place(self) -> None:
        layer = GrowingLayer()
        self.steps(layer, [5])
        before = layer.keys.data_ptr()
        self.steps(layer, [1, 1, 1])
        assert layer.keys.data_ptr() == before
        assert layer.get_seq_length() == 8

    @pytest.mark.parametrize(
        "change",
        [
            lambda layer: layer.crop(-2),
            lambda layer: layer.reorder_cache(torch.tensor([2, 0, 0])),
            lambda layer: layer.batch_select_indices(torch.tensor([1, 2])),
        ],
    )
    def test_after_a_change_from_outside_it_starts_over(self, change: Any) -> None:
        layers = [DynamicLayer(), GrowingLayer()]
        kept = []
        for layer in layers:
            self.steps(layer, [5, 1])
            kept.append(layer.keys)
            saved = layer.keys.clone()
            change(layer)
            batch = layer.keys.shape[0]
            new = torch.ones(batch, 2, 1, 4)
            layer.update(new, new)
            # what was taken out before does not change
            assert torch.equal(kept[-1], saved)
        assert torch.equal(layers[0].keys, layers[1].keys)

    def test_copies_do_not_share_room(self) -> None:
        layer = GrowingLayer()
        self.steps(layer, [5])
        other = copy.copy(layer)
        one, two = torch.zeros(3, 2, 1, 4), torch.ones(3, 2, 1, 4)
        layer.update(one, one)
        other.update(two, two)
        assert torch.equal(layer.keys[:, :, 5:], one)
        assert torch.equal(other.keys[:, :, 5:], two)

    def test_reset(self) -> None:
        layer = GrowingLayer()
        self.steps(layer, [5])
        layer.reset()
        assert layer.get_seq_length() == 0
        expected = self.steps(DynamicLayer(), [3])
        assert torch.equal(self.steps(layer, [3])[0], expected[0])

    def test_gradients_flow_through_it(self) -> None:
        layer = GrowingLayer()
        k = torch.randn(1, 1, 2, 4, requires_grad=True)
        layer.update(k, k)
        keys, _ = layer.update(k, k)
        keys.sum().backward()
        assert k.grad is not None
        assert torch.equal(k.grad, torch.full_like(k, 2.0))

    def test_from_inference_mode_to_outside(self) -> None:
        layer = GrowingLayer()
        with torch.inference_mode():
            self.steps(layer, [5, 1])
        with torch.no_grad():
            self.steps(layer, [1])
        assert layer.get_seq_length() == 7
