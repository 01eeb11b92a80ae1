from __future__ import annotations

from functools import partial

import pytest
import torch
from transformers import masking_utils as hf

from reroll.errors import CaptureError
from reroll.rewrite.capture.masks import MaskKind, describe_mask
from reroll.rewrite.capture.tracing import mask_interface

BLOCKS = torch.tensor([[-1, 0, 0, -1, 1, 1, 1, -1, -1, 2], [0, 0, -1, -1, -1, -1, -1, 1, 1, 1]])
PADDING = torch.tensor([[0, 0, 0, *[1] * 7], [1] * 10])
LEFT = (PADDING.cumsum(-1) == 0).sum(-1)

KINDS = {
    "causal": (hf.causal_mask_function, MaskKind(causal=True)),
    "bidirectional": (hf.bidirectional_mask_function, MaskKind()),
    "window": (hf.sliding_window_causal_mask_function(3), MaskKind(causal=True, window=3)),
    "two-sided window": (
        hf.sliding_window_bidirectional_mask_function(3),
        MaskKind(window=3),
    ),
    "chunks": (hf.chunked_causal_mask_function(4, LEFT), MaskKind(causal=True, chunk=4)),
    "blocks": (
        hf.or_masks(hf.causal_mask_function, hf.blockwise_overlay(BLOCKS)),
        MaskKind(causal=True, blocks=BLOCKS),
    ),
    "blocks over a window": (
        hf.or_masks(hf.sliding_window_causal_mask_function(2), hf.blockwise_overlay(BLOCKS)),
        MaskKind(causal=True, window=2, blocks=BLOCKS),
    ),
    "a window twice": (
        hf.and_masks(hf.sliding_window_causal_mask_function(3), hf.sliding_window_overlay(3)),
        MaskKind(causal=True, window=3),
    ),
    "a window in chunks": (
        hf.and_masks(hf.chunked_causal_mask_function(4, LEFT), hf.sliding_window_overlay(2)),
        MaskKind(causal=True, window=2, chunk=4),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_function_is_described(kind):
    function, expected = KINDS[kind]
    found = describe_mask(function)
    assert found.blocks is expected.blocks
    assert (found.causal, found.window, found.chunk) == (
        expected.causal,
        expected.window,
        expected.chunk,
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding", [None, PADDING], ids=["whole", "left-padded"])
@pytest.mark.parametrize("queries", [10, 4])
def test_the_mask_op_computes_what_transformers_computes(kind, padding, queries):
    function, _ = KINDS[kind]
    if "chunks" in kind and padding is None:
        function = hf.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.long))
    sizes = {"batch_size": 2, "q_length": queries, "kv_length": 10, "q_offset": 10 - queries}
    arguments = {**sizes, "kv_offset": 0, "mask_function": function, "dtype": torch.float32}
    mask = None if padding is None else padding.bool()
    expected = hf.eager_mask(attention_mask=mask, use_vmap=True, **arguments)
    actual = mask_interface(attention_mask=padding, **arguments)
    assert torch.equal(actual, expected.expand_as(actual))


def odd_numbers_only(batch_idx, head_idx, q_idx, kv_idx):
    return kv_idx % 2 == 1


UNKNOWN = {
    "odd_numbers_only": odd_numbers_only,
    "packed_sequence_mask_function": hf.and_masks(
        hf.causal_mask_function, hf.packed_sequence_mask_function(BLOCKS)
    ),
    "padding_mask_function": hf.or_masks(
        hf.causal_mask_function, hf.padding_mask_function(PADDING)
    ),
    # a window that cuts blocks, as in Gemma 3 with images: in the op, blocks reach over the window
    "or_masks": hf.and_masks(
        hf.or_masks(hf.causal_mask_function, hf.blockwise_overlay(BLOCKS)),
        hf.sliding_window_overlay(3),
    ),
    "blockwise_overlay": hf.or_masks(
        hf.or_masks(hf.causal_mask_function, hf.blockwise_overlay(BLOCKS)),
        hf.blockwise_overlay(BLOCKS),
    ),
    # what looks like a window of the op, and is another
    "sliding_window_overlay": hf.sliding_window_overlay(3),
    "sliding_window_bidirectional_overlay": hf.and_masks(
        hf.causal_mask_function, hf.sliding_window_bidirectional_overlay(3)
    ),
    "and_masks": hf.and_masks(
        hf.sliding_window_causal_mask_function(3), hf.sliding_window_overlay(5)
    ),
    "partial": partial(hf.causal_mask_function),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_mask_that_the_op_does_not_model_is_an_error_that_names_it(name):
    with pytest.raises(CaptureError, match=name):
        describe_mask(UNKNOWN[name])


def test_keys_that_start_in_the_past_are_refused():
    with pytest.raises(CaptureError, match="start at 2"):
        mask_interface(1, 2, 4, 2, 2, mask_function=hf.causal_mask_function)
