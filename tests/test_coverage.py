"""A fast part of `benchmarks/coverage.py`: model types whose capture is exact and rolls."""

from __future__ import annotations

import pytest

from benchmarks.coverage import Row, measure

# what each type is there for
CAUSAL = {
    "gemma2": "soft caps, windows in every other layer, four norms",
    "gpt2": "fused projections stored transposed, learned positions",
    "gpt_oss": "attention sinks, experts",
    "gptj": "attention of its own, interleaved rotary embedding",
    "bloom": "attention of its own, ALiBi",
    "mpt": "attention of its own, ALiBi of another form",
    "opt": "positions counted from the mask",
    "phi": "partial rotary embedding, one norm for two branches",
    "olmo2": "norms after the branches and over all heads",
    "qwen3": "norms of queries and keys",
    "smollm3": "no rotary embedding in every fourth layer",
}
ENCODERS = {
    "bert": "an encoder in the plain case",
    "albert": "one layer's weights for all",
    "distilbert": "names of its own",
    "modernbert": "local and global layers, fused gates, a first layer without norm",
    "vit": "images",
    "dinov2": "layer scales",
    "clip_vision_model": "a norm before the layers",
    "bart": "two stacks",
    "whisper": "two stacks, audio",
}
# ModernBERT's first layer has no norm of its own
OUTSIDE = {"modernbert": 1}
TYPES = [("causal", each) for each in CAUSAL] + [("encoder", each) for each in ENCODERS]


@pytest.mark.parametrize(("kind", "model_type"), TYPES, ids=[each for _, each in TYPES])
def test_a_model_type_is_captured_exactly_and_rolled(kind, model_type):
    row = Row(model_type, kind)
    measure(row, lambda _: None)
    assert row.failed is None, row.reason
    assert row.exact
    assert row.rolled_error <= 1e-5 * max(row.scale, 1.0)
    assert row.rolled == row.layers - OUTSIDE.get(model_type, 0)
