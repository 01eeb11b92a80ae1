"""Exactness on the pretrained models that `make models` puts under `models/`."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import transformers

from reroll.rewrite.analysis import tolerances
from reroll.rewrite.analysis.samples import random_inputs
from reroll.rewrite.capture import capture
from reroll.rewrite.capture.raising import raise_idioms
from reroll.rewrite.capture.rolling import roll_loops
from reroll.rewrite.ir.interpret import run
from reroll.rewrite.ir.program import Program

# trips and layers per trip of each loop
LOOPS = {
    "minilm-l6-v2": [(6, 1)],
    "dinov2-small": [(12, 1)],
    "whisper-tiny.en": [(4, 1), (4, 1)],
    "smollm2-135m-instruct": [(30, 1)],
    "gemma-3-270m": [(18, 1)],
}


@dataclass(frozen=True)
class Captured:
    """A model as transformers loads it, and its flat and rolled Programs."""

    model: Any
    flat: Program
    rolled: Program

    def eager(self, inputs) -> dict[str, torch.Tensor]:
        # an encoder has no cache to leave out
        options = {"use_cache": False} if self.model.can_generate() else {}
        with torch.no_grad():
            return self.model(**inputs, **options)


def load(path, dtype: torch.dtype) -> Captured:
    flat = capture(str(path), dtype=dtype, roll=False)
    cls = getattr(transformers, flat.origin.architecture)
    model = cls.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()
    return Captured(model, flat, roll_loops(raise_idioms(flat)))


def sample(program: Program) -> dict[str, torch.Tensor]:
    """Two rows of text, the second with padding on the left, or one of anything larger."""
    text = len(program.inputs) > 1 and program.inputs[0].name == "input_ids"
    return random_inputs(program, rows=2 if text else 1, length=12, padded=True)


@pytest.fixture(scope="module", params=LOOPS)
def fp32(request, real_model):
    yield request.param, load(real_model(request.param), torch.float32)
    # one model at a time
    gc.collect()


def test_the_flat_program_is_bit_identical(fp32):
    _, captured = fp32
    inputs = sample(captured.flat)
    expected, actual = captured.eager(inputs), run(captured.flat, inputs)
    assert actual
    for output, tensor in actual.items():
        assert torch.equal(tensor, expected[output]), output


def test_the_rolled_program_computes_the_same(fp32):
    _, captured = fp32
    inputs = sample(captured.rolled)
    expected, actual = captured.eager(inputs), run(captured.rolled, inputs)
    assert tuple(actual) == captured.flat.outputs
    for output, tensor in actual.items():
        error = tolerances.relative_rms(tensor, expected[output])
        assert error <= tolerances.ROLLED[torch.float32], output


def test_all_layers_are_inside_loops(fp32):
    name, captured = fp32
    assert [(loop.trips, loop.period) for loop in captured.rolled.loops] == LOOPS[name]
    targets = {str(n.target) for _, g in captured.rolled.graphs() for n in g.nodes}
    assert not {t for t in targets if "softmax" in t or "rsqrt" in t or "scaled_dot" in t}
    # mask tokens of pretraining are parameters that the forward never reads
    unread = sum(p.numel() for n, p in captured.model.named_parameters() if "mask_token" in n)
    stored = sum(p.numel() for p in captured.model.parameters())
    assert captured.rolled.parameters() == stored - unread


@pytest.mark.parametrize(
    "name",
    [
        "minilm-l6-v2",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for each in LOOPS
            for name in (each, f"{each}-bf16")
            if name != "minilm-l6-v2"
        ),
    ],
)
def test_bf16_is_as_near_to_fp32_as_the_original_is(name, real_model):
    """Roundings fall elsewhere, so both are compared with fp32 over the same rounded weights."""
    captured = load(real_model(name), torch.bfloat16)
    inputs = sample(captured.rolled)
    original, actual = captured.eager(inputs), run(captured.rolled, inputs)
    captured.model.float()
    whole = {n: t.float() if t.is_floating_point() else t for n, t in inputs.items()}
    reference = captured.eager(whole)
    for output, tensor in actual.items():
        assert tensor.dtype == original[output].dtype == torch.bfloat16
        distance = partial(tolerances.relative_rms, expected=reference[output])
        assert distance(tensor) <= 1.5 * distance(original[output]), output
