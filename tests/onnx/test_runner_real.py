"""The runner with a pretrained model that `make models` puts under `models/`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import reroll
import reroll.onnx
from reroll.export.onnx import Onnx
from reroll.rewrite.analysis.samples import sample_text

CONTEXT, NEW = 512, 64
# of the largest logit: two that are nearer to each other are equal in fp32
NEAR = 1e-5


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("runtime", ["ort", "any"])
def test_drafts_do_not_change_what_is_written(
    real_model: Any, tmp_path: Path, runtime: str
) -> None:
    path = real_model("smollm2-135m-instruct")
    program = reroll.capture(str(path), dtype="float32")
    program = program.with_draft(program.twin("window(size=256, sinks=4)"))
    found = Onnx(graphs=("unrolled",), runtime=runtime).write(program, tmp_path)
    # the draft has no weights of its own
    assert not [name for name in found["weights"]["sha256"] if name.startswith("draft-")]
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    ids = np.array(tokenizer(sample_text())["input_ids"][:CONTEXT])
    with torch.no_grad():
        expected = program.to_module().generate(
            torch.from_numpy(ids)[None], max_new_tokens=NEW, do_sample=False, eos_token_id=None
        )[0].numpy()  # fmt: skip
    runner = reroll.onnx.load(tmp_path, threads=1)
    for draft, count in ((None, None), ("lookup", 4), ("draft", 4), ("auto", None)):
        actual = runner.generate(ids, NEW, draft, draft_tokens=count, ends=())
        same = int((actual == expected).cumprod().sum())
        if same < len(expected):
            assert _gap(runner, expected[:same]) < NEAR, draft
    assert runner.report is not None


def _gap(runner: reroll.onnx.Runner, ids: np.ndarray) -> float:
    """The distance of the two best logits behind tokens, over the largest."""
    state = runner.sequence().state
    best = np.sort(state.extend(ids.tolist(), 1)[-1])[-2:]
    return float((best[1] - best[0]) / abs(best[1]))
