"""A part of the coverage benchmark: tiny models of many types capture exactly and roll whole."""

from __future__ import annotations

import pytest

from benchmarks import coverage

# a type for each way of being different: norms, positions, windows, experts, shared weights
CAUSAL = (
    "llama gpt2 gemma3_text bloom falcon gptj mpt gpt_neox opt phi cohere olmo2 qwen3 mixtral "
    "gpt_oss smollm3"
)
ENCODERS = "albert modernbert mpnet dinov2_with_registers clip_vision_model siglip_vision_model t5"
# the first layer has no norm before its attention, and stays outside
PARTLY = {"modernbert": 5}
# eager runs these through a fused kernel, whose rounding is another
ROUNDED = {"siglip_vision_model"}


def _measured(name: str, kind: str) -> coverage.Row:
    row = coverage.Row(name, kind)  # type: ignore[arg-type]
    coverage.measure(row, lambda _: None)
    assert row.failed is None, row.reason
    return row


@pytest.mark.parametrize("name", CAUSAL.split())
def test_causal_models(name: str) -> None:
    row = _measured(name, "causal")
    assert row.error == 0.0
    assert row.rolled == row.layers
    assert row.rolled_error is not None
    assert row.rolled_error <= coverage.TOLERANCE * max(row.scale or 0.0, 1.0)


@pytest.mark.parametrize("name", ENCODERS.split())
def test_encoders(name: str) -> None:
    row = _measured(name, "encoder")
    assert row.close if name in ROUNDED else row.error == 0.0
    assert row.rolled == PARTLY.get(name, row.layers)
    assert row.rolled_error is not None
    assert row.rolled_error <= coverage.TOLERANCE * max(row.scale or 0.0, 1.0)
