"""Recovery of a model of images: what is held out, bad input, and a phase-wise student."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessor

import reroll
from reroll.errors import UsageError
from reroll.recover import recover
from reroll.recover.images import image_corpus, image_input
from reroll.recover.recipe import parse
from tests import tiny

pytestmark = pytest.mark.usefixtures("captured_once")

# 16 patches and the class token
POSITIONS = 17


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny.save(tiny.vit(), tmp_path_factory.mktemp("made") / "vit")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for number in range(24):
        coarse = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((20, 12), Image.Resampling.BICUBIC)
        place = folder / ("a" if number < 12 else "b")
        place.mkdir(exist_ok=True)
        image.save(place / f"{number}.png")
    return folder


def test_images_are_prepared_for_the_model(original: Path, pictures: Path) -> None:
    seen = image_input(reroll.capture(str(original)))
    assert seen is not None
    assert (seen.height, seen.width, seen.positions) == (16, 16, POSITIONS)
    pixels = seen.read(pictures / "a" / "0.png")
    assert pixels.shape == (3, 16, 16)
    # the processor's mean and deviation are a half
    assert -1 <= pixels.min() < pixels.max() <= 1


def test_what_is_held_out_is_not_trained_on(original: Path, pictures: Path) -> None:
    seen = image_input(reroll.capture(str(original)))
    assert seen is not None
    found = image_corpus([pictures], seen, held_rows=4)
    sides: Any = found.train, found.held_out
    train, held = ({p.name for p in side.paths} for side in sides)
    assert len(held) == 4
    assert not train & held
    assert len(train | held) == 24
    assert {p.parent.name for p in sides[1].paths} == {"a", "b"}


def test_a_model_of_phases_is_fitted_to_images(
    original: Path, pictures: Path, tmp_path: Path
) -> None:
    program = reroll.run_passes(
        reroll.capture(str(original)), "tie(phases=[1], init=average, scaling=true)", measure=False
    )
    stages = [{"align": {"lr": 1e-2, "train": "all", "start_tokens": 10 * POSITIONS}}]
    recipe = parse({"recover": {"batch": 4, "held_rows": 4, "stages": stages}})
    out = tmp_path / "out"
    report = recover(
        program, out, teacher=str(original), data=[pictures], recipe=recipe, tokens=160 * POSITIONS
    )
    before, started, after = report.measures
    assert report.tokens == 160 * POSITIONS
    assert started["error_after"] < started["error_before"]
    assert after["relative_error"] < 0.8 * before["relative_error"]
    assert after["cosine"] > before["cosine"]
    lines = (out / "recovery.jsonl").read_text(encoding="utf-8").splitlines()
    assert len([line for line in map(json.loads, lines) if "loss" in line]) == 40
    model = reroll.load(out).to_module()
    assert model(pixel_values=torch.zeros(1, 3, 16, 16))[0].shape == (1, POSITIONS, 32)


def test_bad_input_is_named(original: Path, pictures: Path, tmp_path: Path) -> None:
    program = reroll.capture(str(original))
    seen = image_input(program)
    assert seen is not None
    with pytest.raises(UsageError, match="no such directory"):
        image_corpus([tmp_path / "none"], seen, held_rows=1)
    with pytest.raises(UsageError, match="0 images"):
        image_corpus([tmp_path], seen, held_rows=1)
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match="cannot be read"):
        seen.read(tmp_path / "broken.png")
    (original / "preprocessor_config.json").rename(tmp_path / "kept.json")
    with pytest.raises(UsageError, match="preprocessor_config"):
        image_input(reroll.capture(str(original)))
    (tmp_path / "kept.json").rename(original / "preprocessor_config.json")
