"""Lowered encoders beside transformers: outputs, padding, losses, and inputs that are refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

from reroll.errors import UsageError
from reroll.rewrite.analysis import tolerances
from reroll.rewrite.capture import capture
from reroll.runtime.lowering.lower import lower
from tests import captured

pytestmark = pytest.mark.usefixtures("captured_once")

TEXT = {**captured.TEXT, "intermediate_size": 48}


def inputs_of(name: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    if name in ("vit", "dinov2"):
        size = captured.model(name).config.image_size
        return {"pixel_values": torch.randn(3, 3, size, size, generator=generator)}
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[0, 8:] = 0
    ids = torch.randint(3, 64, (3, 12), generator=generator)
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", ["bert", "vit", "dinov2"])
def test_outputs_are_the_originals(name: str) -> None:
    inputs = inputs_of(name)
    expected, actual = captured.model(name)(**inputs), lower(captured.captured(name))(**inputs)
    assert list(actual.keys()) == [k for k in expected if isinstance(expected[k], torch.Tensor)]
    for key in actual:
        want, got = expected[key], actual[key]
        if "attention_mask" in inputs and want.shape[:2] == inputs["attention_mask"].shape:
            kept = inputs["attention_mask"].bool()
            want, got = want[kept], got[kept]
        torch.testing.assert_close(got, want)


HEADS: dict[str, tuple[Any, dict[str, Any]]] = {
    "BertForMaskedLM": (transformers.BertConfig, {"labels": torch.randint(0, 64, (3, 12))}),
    "BertForSequenceClassification": (transformers.BertConfig, {"labels": torch.tensor([0, 2, 1])}),
    "BertForTokenClassification": (
        transformers.BertConfig,
        {"labels": torch.randint(0, 3, (3, 12))},
    ),
    "BertForQuestionAnswering": (
        transformers.BertConfig,
        {"start_positions": torch.tensor([1, 2, 3]), "end_positions": torch.tensor([4, 4, 4])},
    ),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_and_their_losses(name: str) -> None:
    config, labels = HEADS[name]
    torch.manual_seed(0)
    original = getattr(transformers, name)(
        config(**TEXT, num_labels=2 if "Question" in name else 3)
    ).eval()
    inputs = {**inputs_of("bert"), **labels}
    lowered = lower(capture(original))
    assert type(lowered).__name__ == f"Reroll{name.removeprefix('Bert')}"
    torch.testing.assert_close(lowered(**inputs).loss, original(**inputs).loss)
    lowered(**inputs).loss.backward()


def test_image_classification() -> None:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        image_size=16, patch_size=4, num_labels=5,
    )  # fmt: skip
    original = transformers.ViTForImageClassification(config).eval()
    inputs = {"pixel_values": torch.randn(3, 3, 16, 16), "labels": torch.tensor([0, 3, 4])}
    lowered = lower(capture(original))
    torch.testing.assert_close(lowered(**inputs).loss, original(**inputs).loss)
    assert lowered.config.id2label == original.config.id2label


def test_pixels_in_fp32_are_narrowed_as_the_original_does() -> None:
    """Image processors know nothing of the model's dtype."""
    pixels = inputs_of("vit")["pixel_values"]
    original = copy.deepcopy(captured.model("vit")).to(torch.bfloat16)
    actual, expected = lower(capture(original))(pixels)[0], original(pixels)[0]
    assert actual.dtype == torch.bfloat16
    error = tolerances.relative_rms(actual, expected)
    assert error <= tolerances.ROLLED[torch.bfloat16]


def test_the_main_input_comes_first_whatever_its_name() -> None:
    model, inputs = lower(captured.captured("vit")), inputs_of("vit")
    assert torch.equal(model(inputs["pixel_values"])[0], model(**inputs)[0])


def test_an_input_that_the_program_does_not_read_is_refused() -> None:
    model, inputs = lower(captured.captured("bert")), inputs_of("bert")
    same = model(**inputs, token_type_ids=torch.zeros(3, 12, dtype=torch.long))
    assert torch.equal(same[0], model(**inputs)[0])
    with pytest.raises(UsageError, match="no input pixel_values"):
        model(**inputs, pixel_values=torch.zeros(1))
    if "token_type_ids" not in {i.name for i in model.program.inputs}:
        with pytest.raises(UsageError, match="no input token_type_ids"):
            model(**inputs, token_type_ids=torch.ones(3, 12, dtype=torch.long))
