"""Models that choose the keys they read by scores of keys of their own, which the cache keeps too.

Many of the scores are exactly zero. Which of equal scores are chosen depends on how many there are,
so a model with a cache, and one that reads everything again, give different tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reroll.export.onnx import Onnx
from reroll.rewrite.analysis.tolerances import forward, relative_rms
from tests.captured import captured, model

WISHES = {
    "max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0,
    "output_logits": True, "return_dict_in_generate": True,
}  # fmt: skip
IDS = torch.randint(3, 64, (3, 20), generator=torch.Generator().manual_seed(0))


def generated(made: Any, mask: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """Tokens, and the logits that they were chosen by."""
    out = made.generate(IDS, attention_mask=mask, **{**WISHES, **options})
    return out.sequences, torch.stack(out.logits, 1)


def test_one_with_a_cache_is_another_than_one_that_reads_everything_again():
    with_cache, without = generated(model("indexer")), generated(model("indexer"), use_cache=False)
    assert relative_rms(without[1], with_cache[1]) > 1e-3


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_it_generates_with_its_cache(side: str):
    program = captured("indexer")
    assert program.has_past
    assert not program.origin.remarks
    lead, at = torch.arange(3)[:, None] * 3, torch.arange(20)[None]
    masks = {"none": None, "left": (at >= lead).long(), "right": (at < 20 - lead).long()}
    tokens, logits = generated(program.to_module(), masks[side])
    expected, expected_logits = generated(model("indexer"), masks[side])
    assert torch.equal(tokens, expected)
    assert relative_rms(logits, expected_logits) <= forward(torch.float32)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"cache_implementation": "static"}])
def test_beams_and_caches_of_a_fixed_size(options: dict[str, Any]):
    beams = {name: value for name, value in options.items() if name == "num_beams"}
    actual, expected = (
        made.generate(IDS, **{**WISHES, "return_dict_in_generate": False}, **given)
        for made, given in (
            (captured("indexer").to_module(), options),
            (model("indexer"), beams),
        )
    )
    assert torch.equal(actual, expected)


def test_a_graph_may_choose_others_of_equal_scores(tmp_path: Path):
    """ONNX takes the first; what it makes of its choice is what torch makes of it."""
    found = Onnx(check=True).write(captured("indexer"), tmp_path)
    for kind in ("loop", "unrolled"):
        assert found["graphs"][kind]["check"]["relative_rms_error"] < 1e-5
    # its keys come without values
    parts = sorted((state["layer"], state["part"]) for state in found["states"])
    assert [part for _, part in parts] == ["key", "value", "key"] * 2
    assert not (tmp_path / "genai_config.json").exists()
