"""A fast part of `benchmarks/coverage.py`: types that are exact, by every door and call."""

from __future__ import annotations

import pytest
import torch

from benchmarks import calls
from benchmarks.coverage import DOORS, Results, Row, measure
from benchmarks.coverage_table import called, exports, reason, score, totals
from benchmarks.tables import rendered as rendered_table

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
# each is another variant of what one of the others shows
SLOW = {
    *("gptj", "mpt", "phi", "bloom", "smollm3", "olmo2", "qwen3", "gpt2", "opt", "whisper"),
    *("albert", "dinov2", "clip_vision_model", "distilbert"),
}
TYPES = [
    pytest.param(kind, each, id=each, marks=[pytest.mark.slow] if each in SLOW else [])
    for kind, types in (("causal", CAUSAL), ("encoder", ENCODERS))
    for each in types
]


@pytest.mark.parametrize(("kind", "model_type"), TYPES)
def test_a_model_type_is_captured_exactly_and_rolled(kind, model_type):
    row = Row(model_type, kind)
    measure(row, lambda _: None, steps=("build", "graph", "roll"))
    assert row.failed is None, row.reason
    assert row.exact
    assert row.rolled_error <= 1e-5 * max(row.scale, 1.0)
    assert row.rolled == row.layers - OUTSIDE.get(model_type, 0)


def test_a_type_is_right_from_a_directory_in_every_call():
    row = Row("llama", "causal", "directory")
    measure(row, lambda _: None)
    assert row.right, reason(row)
    # five calls of three measures, here and from the saved model, and two graphs
    assert score(row) == "32/32"
    assert called(row)
    assert exports(row)


@pytest.mark.slow
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("model_type", ["gemma3_text", "gpt2", "opt", "roberta", "mixtral"])
def test_a_type_is_right_by_every_door(model_type, door):
    row = Row(model_type, "causal", door)
    measure(row, lambda _: None)
    assert row.right, reason(row)


EXPECTED = {
    "forward": {"value": torch.tensor([[[1.0], [2.0]]])},
    "loss": {},
    "tokens": {"value": torch.tensor([[1, 0]]), "logits": torch.tensor([[[0.0, 2.0], [1.0, 0.5]]])},
}


@pytest.mark.parametrize(
    ("changed", "cells"),
    [
        ({}, ["0", "-", "0"]),
        ({"forward": {"value": torch.tensor([[[1.0], [2.000001]]])}}, ["4.3e-07", "-", "0"]),
        ({"forward": {"value": torch.tensor([[[1.0], [2.1]]])}}, ["wrong: 4.5e-02", "-", "0"]),
        ({"forward": {"error": "UsageError: no"}}, ["refused: UsageError: no", "-", "0"]),
        (
            {"tokens": {"value": torch.tensor([[1, 1]])}},
            ["0", "-", "wrong: token 2 of row 1, by 5.0e-01"],
        ),
        (
            {"tokens": {"value": torch.tensor([[1]])}},
            ["0", "-", "wrong: [1, 1] tokens, not [1, 2]"],
        ),
    ],
)
def test_a_cell_says_how_a_call_differs(changed, cells):
    found = calls.compare({**EXPECTED, **changed}, EXPECTED, {}, torch.float32)
    assert list(found.values()) == cells


def test_tokens_may_part_within_rounding_and_are_counted():
    changed = {**EXPECTED, "tokens": {"value": torch.tensor([[1, 1]])}}
    found = calls.compare(changed, {**EXPECTED, "farthest": 0.25}, {}, torch.float32)
    assert found["tokens"] == "ties 1"


def test_rows_are_kept_and_make_a_table(tmp_path):
    file = tmp_path / "coverage.json"
    results = Results(file)
    results.add(
        Row("a", "causal", nodes=3, error=0.0, cells={"ids.forward": "0", "export.loop": "0"})
    )
    results.add(Row("b", "causal", failed="graph", reason="CaptureError: no | yes"))
    results.write()
    rows = list(Results(file).rows.values())
    assert [row.right for row in rows] == [True, False]
    assert "| captured | 1 |" in totals(rows)
    rendered = rendered_table("coverage-causal-refusals", tmp_path)
    assert "CaptureError: no / yes | b (1)" in rendered
