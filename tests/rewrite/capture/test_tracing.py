from __future__ import annotations

import copy

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification
from transformers import masking_utils as hf
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from reroll.errors import CaptureError
from reroll.rewrite.capture.export import capture
from reroll.rewrite.capture.tracing import (
    _pad_blocks,
    attention_interface,
    custom_layers,
    make_cache,
    mask_interface,
    tracing,
)
from tests.captured import gemma3, gpt2, llama, whisper
from tests.tiny import types as tiny_types


def heads(count: int) -> torch.Tensor:
    return torch.randn(2, count, 5, 8)


def test_an_unknown_keyword_of_attention_is_an_error_that_names_it():
    module = torch.nn.Linear(1, 1)
    with pytest.raises(CaptureError, match=r"Linear.* landmarks, temperature"):
        attention_interface(
            module, heads(4), heads(2), heads(2), None, temperature=2.0, landmarks=heads(1)
        )


def test_keywords_that_change_nothing_are_let_through():
    arguments = (torch.nn.Identity(), heads(4), heads(2), heads(2), None)
    expected, _ = attention_interface(*arguments)
    actual, weights = attention_interface(
        *arguments,
        sliding_window=3,
        is_causal=True,
        position_ids=heads(1),
        unknown=None,
        other=False,
    )
    assert torch.equal(actual, expected)
    # a stand-in, which no model computes with
    assert weights.shape == (2, 4, 5, 5)
    assert weights.isnan().all()


def test_masks_and_biases_add_up():
    module, q, k = torch.nn.Identity(), heads(4), heads(2)
    bias, mask = torch.randn(1, 4, 5, 5), torch.rand(2, 1, 5, 5) < 0.7
    mask[..., 0] = True
    low = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    both, _ = attention_interface(module, q, k, k, low, position_bias=bias)
    assert torch.equal(both, attention_interface(module, q, k, k, bias + low)[0])
    assert torch.equal(
        attention_interface(module, q, k, k, mask)[0], attention_interface(module, q, k, k, low)[0]
    )
    assert torch.equal(
        attention_interface(module, q, k, k, None, position_bias=bias)[0],
        attention_interface(module, q, k, k, bias)[0],
    )


def snapshot(model):
    """Everything about a model that tracing touches."""
    configs = [m.config for m in model.modules() if hasattr(m, "config")]
    return {
        "config": copy.deepcopy(model.config.to_dict()),
        "implementations": [c._attn_implementation for c in configs],
        "training": [module.training for module in model.modules()],
        "buffers": {name: (id(b), b.clone()) for name, b in model.named_buffers()},
        "parameters": {name: (id(p), p.clone()) for name, p in model.named_parameters()},
        "attention": dict(AttentionInterface._global_mapping),
        "masks": dict(AttentionMaskInterface._global_mapping),
        "grad": torch.is_grad_enabled(),
    }


def same(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize(
    "make", [llama, gemma3, *(pytest.param(m, marks=pytest.mark.slow) for m in (gpt2, whisper))]
)
def test_a_model_is_left_as_it_was(make):
    model = make().train()
    list(model.modules())[3].eval()
    before = snapshot(model)
    assert "eager" in before["attention"] or "eager" in before["masks"]
    capture(model, roll=False)
    assert same(snapshot(model), before)
    assert "reroll" not in AttentionInterface._global_mapping


def test_a_model_is_left_as_it_was_after_an_error():
    model = llama()
    model.set_attn_implementation("sdpa")
    model.train()
    before = snapshot(model)

    def fail(*_, **__):
        raise RuntimeError("this layer cannot run")

    forward, model.model.layers[1].forward = model.model.layers[1].forward, fail
    with pytest.raises(CaptureError, match="this layer cannot run"):
        capture(model)
    model.model.layers[1].forward = forward
    assert same(snapshot(model), before)


def test_inside_tracing_a_model_finds_our_functions():
    model = gemma3().train()
    with tracing(model, "reroll"):
        assert model.config._attn_implementation == "reroll"
        assert AttentionInterface()["reroll"].func is attention_interface
        assert AttentionMaskInterface()["reroll"].func is mask_interface
        assert not any(module.training for module in model.modules())
    with tracing(model, "eager"):
        assert AttentionMaskInterface()["eager"].func is mask_interface
        assert "reroll" not in AttentionInterface()
    assert AttentionMaskInterface()["eager"] is hf.eager_mask


class KeepingMore(DynamicLayer):
    """A cache layer with state of its own beside keys and values."""

    more = largest = None

    def append_more(self, new):
        self.more = new if self.more is None else torch.cat([self.more, new], dim=-2)
        return self.more

    def keep_largest(self, new):
        self.largest = new if self.largest is None else torch.maximum(self.largest, new)
        return self.largest

    def append_both(self, new, other):
        return self.append_more(new), other


@pytest.mark.parametrize("shape", [(2, 5, 8), (2, 3, 5, 8)])
def test_what_a_cache_layer_appends_beside_keys_is_a_cache_too(shape, monkeypatch):
    kept = []
    op = torch.ops.reroll.cache
    monkeypatch.setattr(torch.ops.reroll, "cache", lambda *given: kept.append(given) or op(*given))
    cache = make_cache(0, 5, 1, False, [KeepingMore()])
    new = torch.randn(shape)
    assert torch.equal(cache.layers[0].append_more(new), new)
    ((k, v, total),) = kept
    assert torch.equal(k.reshape(shape), new)
    assert (k.dim(), v.shape[-1], total) == (4, 0, 5)


def test_what_it_keeps_otherwise_is_refused():
    new = torch.randn(2, 5, 8)
    layer = make_cache(0, 5, 1, False, [KeepingMore()]).layers[0]
    with pytest.raises(CaptureError, match=r"KeepingMore: .*more than keys.*keep_largest"):
        layer.keep_largest(new)
    with pytest.raises(CaptureError, match="append_both"):
        layer.append_both(new, new)
    with pytest.raises(CaptureError, match="positions"):
        layer.positions = new
    assert not hasattr(layer, "update_indexer")


def test_own_layers_are_those_of_the_configuration():
    assert [type(layer).__name__ for layer in custom_layers(gemma3().config)] == [
        "DynamicSlidingWindowLayer",
        "DynamicLayer",
    ] * 2
    assert custom_layers(object()) == []


def test_blocks_are_padded_as_transformers_pads_them():
    ids = torch.tensor([[0, 0, -1, 1], [3, -1, -1, -1]])
    for length, offset in ((4, 0), (7, 0), (5, 2)):
        expected = hf.maybe_pad_block_sequence_ids(ids, None, length, offset)
        assert torch.equal(_pad_blocks(ids, None, length, offset), expected)


def test_a_model_that_asks_whether_there_is_anything_to_pad_keeps_its_cache():
    program = capture(tiny_types.build("gemma4_unified"), roll=False)
    assert program.has_past
    assert program.origin.cache_span is None


def test_a_classifier_does_not_keep_the_kind_of_loss_that_capture_asked_for():
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, num_labels=3,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    before = model.config.to_dict()
    capture(model)
    assert model.config.to_dict() == before
