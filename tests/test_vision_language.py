"""The language part of vision-language models: captured with text alone, and saved by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

import reroll
from reroll.errors import CaptureError, UsageError
from reroll.evaluate.inspect import inspect_model
from tests.tiny.configs import tiny_config
from tests.tiny.types import perturb

QUICK = ["llava", "qwen2_vl", "mllama"]
OTHERS = [
    "llava_next", "mistral3", "paligemma", "idefics3", "smolvlm", "internvl", "qwen2_5_vl",
    "qwen3_vl", "gemma3", "llama4",
]  # fmt: skip
KINDS = [*QUICK, *(pytest.param(kind, marks=pytest.mark.slow) for kind in OTHERS)]


def composite(kind: str) -> Any:
    """A tiny random model with all its towers."""
    cls = getattr(transformers, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[kind])
    torch.manual_seed(0)
    model = cls._from_config(tiny_config(kind, decoder=False), attn_implementation="eager").eval()
    perturb(model, 0)
    return model


def generated(model: Any) -> Any:
    """Greedy tokens of a batch of which one row is padded on the left."""
    ids = torch.tensor([[10, 10, 10, 44, 65, 23], [31, 92, 53, 64, 35, 86]])
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 1, "pad_token_id": 10}
    return model.generate(input_ids=ids, attention_mask=mask, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_the_language_part_generates_what_the_whole_does_with_text(kind, tmp_path):
    model = composite(kind)
    program = reroll.capture(model)
    assert program.origin.auto_class == "AutoModelForCausalLM"
    assert program.loops
    said = " ".join(program.origin.remarks)
    assert "pixel_values" in said
    assert "vision" in said or "visual" in said
    expected = generated(model)
    assert torch.equal(generated(program.to_module()), expected)
    program.save(str(tmp_path / "out"))
    assert "pixel_values" in (tmp_path / "out" / "README.md").read_text().replace("\\", "")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(generated(opened), expected)
    for call in (opened, opened.generate):
        with pytest.raises(UsageError, match="left out"):
            call(input_ids=torch.tensor([[5, 6]]), pixel_values=torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("kind", ["llava", pytest.param("qwen3_vl", marks=pytest.mark.slow)])
def test_a_directory_in_half_precision_gives_the_language_part(kind, tmp_path, caplog):
    path = tmp_path / "model"
    composite(kind).to(torch.bfloat16).save_pretrained(path)
    model: Any = transformers.AutoModelForImageTextToText.from_pretrained(
        path, attn_implementation="eager", dtype="auto"
    )
    program = reroll.capture(str(path), roll=False)
    assert "pixel_values" in caplog.text
    assert program.dtype is torch.bfloat16
    assert torch.equal(generated(program.to_module()), generated(model.eval()))


def test_towers_that_are_not_read_are_named_and_not_saved(tmp_path):
    model = composite("llava")
    found = inspect_model(model, check=False)
    towers = sum(
        p.numel() for n, p in model.named_parameters() if "vision" in n or "projector" in n
    )
    assert found["parameters"] == sum(p.numel() for p in model.parameters()) - towers
    unread = found["remarks"][1]
    assert "model.vision_tower" in unread
    assert "model.multi_modal_projector" in unread


def seen(kind: str) -> tuple[Any, Any, dict[str, Any]]:
    """A model, the Program that reads its pictures, and a prompt with one picture, padded."""
    model = composite(kind)
    program = reroll.capture(model, pictures=True)
    torch.manual_seed(0)
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        features = model.model.get_image_features(pixels, return_dict=True).pooler_output
    count = sum(f.shape[-2] for f in features)
    ids = torch.randint(10, 190, (1, count + 6))
    ids[:, 2 : 2 + count] = model.config.image_token_id
    mask = torch.ones_like(ids)
    mask[:, 0] = 0
    return model, program, {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


@pytest.mark.parametrize(
    "kind",
    [
        "internvl",
        *(pytest.param(k, marks=pytest.mark.slow) for k in ("llava", "paligemma", "gemma3")),
    ],
)
def test_pictures_are_read_where_the_graph_allows_it(kind, tmp_path):
    model, program, prompt = seen(kind)
    assert program.origin.auto_class == "AutoModelForImageTextToText"
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 1, "pad_token_id": 10}
    expected = model.generate(**prompt, **options)
    module = program.to_module()
    assert torch.equal(module.generate(**prompt, **options), expected)
    assert torch.equal(generated(module), generated(model))
    other = {**prompt, "pixel_values": -3 * prompt["pixel_values"]}
    with torch.no_grad():
        assert not torch.equal(module(**other).logits, module(**prompt).logits)
        error = (module(**other).logits - model(**other).logits)[:, 1:].abs().max()
    assert error < 1e-4
    program.save(str(tmp_path / "out"))
    for auto in (transformers.AutoModelForImageTextToText, AutoModelForCausalLM):
        opened: Any = auto.from_pretrained(tmp_path / "out")
        assert torch.equal(opened.generate(**prompt, **options), expected)
    with pytest.raises(UsageError, match="0 places for pictures"):
        module(input_ids=torch.tensor([[5, 6]]), pixel_values=prompt["pixel_values"])
    with pytest.raises(UsageError, match="captured with"):
        module(input_ids=prompt["input_ids"], pixel_values=torch.zeros(1, 3, 16, 16))


def test_pictures_that_depend_on_the_data_are_refused_and_the_language_part_is_offered():
    with pytest.raises(
        CaptureError, match=r"captured \(beside.*image_grid_thw.*\n.*leave the pictures"
    ):
        reroll.capture(composite("qwen2_vl"), pictures=True)
