"""Whisper as people use it: its own `generate`, pipelines, copies; the text is the original's."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers.models.whisper.generation_whisper import WhisperGenerationMixin

import reroll
from reroll.errors import UsageError
from reroll.runtime.models.own_generation import own_generation
from tests import captured
from tests.real import stored_dtype

pytestmark = pytest.mark.usefixtures("captured_once")

# of the tiny model: tokens from the first timestamp on, and frames of one part of a recording
SETTINGS = {
    "no_timestamps_token_id": 10, "is_multilingual": True, "suppress_tokens": [5],
    "begin_suppress_tokens": [6], "lang_to_id": {"<|en|>": 3, "<|de|>": 4},
    "task_to_id": {"transcribe": 7, "translate": 8}, "prev_sot_token_id": 9, "max_length": 40,
}  # fmt: skip
PART = 100


@cache
def pair() -> tuple[Any, Any]:
    original = copy.deepcopy(captured.model("whisper"))
    for name, value in SETTINGS.items():
        setattr(original.generation_config, name, value)
    return original, reroll.capture(original).to_module()


def features(frames: int = PART) -> torch.Tensor:
    return torch.randn(2, 80, frames, generator=torch.Generator().manual_seed(0))


WISHES: dict[str, dict[str, Any]] = {
    "short": {},
    "timestamps": {"return_timestamps": True},
    "task and languages": {"language": ["de", "en"], "task": "translate"},
    "a prompt": {"prompt_ids": torch.tensor([9, 40, 41])},
    "suppressed": {"suppress_tokens": [5, 20, 30]},
    "beams": {"num_beams": 2},
    "long": {"frames": 250, "return_timestamps": True, "return_segments": True},
    "several temperatures": {
        "frames": 250, "return_timestamps": True, "temperature": (0.0, 0.5),
        "logprob_threshold": -0.1, "no_speech_threshold": 0.6, "condition_on_prev_tokens": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", WISHES)
def test_generates_what_the_original_generates(name: str) -> None:
    wishes = dict(WISHES[name])
    frames = wishes.pop("frames", PART)
    mask = torch.ones(2, frames, dtype=torch.long)
    # the second recording is shorter
    mask[1, frames - 30 :] = 0
    texts = []
    for model in pair():
        torch.manual_seed(0)
        wishes["attention_mask"] = mask
        out = model.generate(features(frames), max_new_tokens=8, **copy.deepcopy(wishes))
        parts = out["segments"] if isinstance(out, dict) else []
        times = [[(float(p["start"]), float(p["end"])) for p in row] for row in parts]
        texts.append(((out["sequences"] if isinstance(out, dict) else out).tolist(), times))
    assert texts[1] == texts[0]


def test_scores_and_attention_weights_are_returned() -> None:
    wishes = {"return_dict_in_generate": True, "output_scores": True, "output_attentions": True}
    original, lowered = pair()
    original.set_attn_implementation("eager")
    found = [m.generate(features(), max_new_tokens=3, **wishes) for m in (original, lowered)]
    assert torch.equal(found[1].sequences, found[0].sequences)
    torch.testing.assert_close(found[1].scores, found[0].scores, rtol=1e-3, atol=1e-3)
    for got, want in zip(found[1].cross_attentions, found[0].cross_attentions, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_a_mask_that_the_original_does_not_read_is_taken() -> None:
    original, lowered = pair()
    assert lowered.program.origin.unread == ("attention_mask",)
    mask = torch.zeros(2, PART, dtype=torch.long)
    inputs = {"input_features": features(), "decoder_input_ids": torch.tensor([[1, 3], [1, 4]])}
    with torch.no_grad():
        expected, actual = (m(**inputs, attention_mask=mask).logits for m in (original, lowered))
    torch.testing.assert_close(actual, expected)
    assert reroll.parse(str(lowered.program)).origin.unread == ("attention_mask",)


def test_a_mask_that_the_capture_left_out_is_refused() -> None:
    program = captured.captured("whisper")
    inputs = {"input_features": features(), "decoder_input_ids": torch.tensor([[1, 3], [1, 4]])}
    unknown = replace(program, origin=replace(program.origin, unread=())).to_module()
    unknown(**inputs, attention_mask=torch.ones(2, PART, dtype=torch.long))
    with pytest.raises(UsageError, match="no input attention_mask"):
        unknown(**inputs, attention_mask=torch.zeros(2, PART, dtype=torch.long))


def test_copies_and_pickles_generate_the_same() -> None:
    _, lowered = pair()
    assert isinstance(lowered, WhisperGenerationMixin)
    wanted = lowered.generate(features(), max_new_tokens=4)
    for each in (copy.deepcopy(lowered), pickle.loads(pickle.dumps(lowered))):
        assert type(each) is type(lowered)
        assert torch.equal(each.generate(features(), max_new_tokens=4), wanted)


def test_convolutions_are_modules_as_in_the_original() -> None:
    original, lowered = pair()
    found = [
        {n: (type(m), m.stride) for n, m in each.named_modules() if isinstance(m, nn.Conv1d)}
        for each in (original, lowered)
    ]
    assert len(found[0]) == 2
    assert found[1] == found[0]


def test_a_saved_model_has_the_type_of_lowered_models_in_its_file(tmp_path: Path) -> None:
    _, lowered = pair()
    assert lowered.config.model_type == "whisper"
    lowered.save_pretrained(tmp_path)
    assert '"model_type": "reroll"' in (tmp_path / "config.json").read_text()
    again = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path)
    assert type(again) is type(lowered)
    wanted = lowered.generate(features(), max_new_tokens=4)
    assert torch.equal(again.generate(features(), max_new_tokens=4), wanted)


def test_most_models_have_the_common_generation() -> None:
    assert own_generation("WhisperForConditionalGeneration") is WhisperGenerationMixin
    for name in ("T5ForConditionalGeneration", "LlamaForCausalLM", "NoSuchModel", "__version__"):
        assert own_generation(name) is None


def sound(seconds: float, rate: int = 16000) -> np.ndarray:
    """A recording like speech: voiced syllables with random pitch and formants, between pauses."""
    random, time = np.random.default_rng(0), np.arange(int(seconds * rate)) / rate
    wave, start = np.zeros_like(time), 0.2
    while start < seconds - 0.5:
        length, pitch = random.uniform(0.12, 0.3), random.uniform(90, 180)
        inside = (time >= start) & (time < start + length)
        at = time[inside] - start
        formants = [random.uniform(a, b) for a, b in ((300, 800), (900, 2300), (2400, 3000))]
        for number in range(1, 30):
            near = sum(np.exp(-(((number * pitch - f) / 120) ** 2)) for f in formants)
            tone = np.sin(2 * np.pi * pitch * number * at)
            wave[inside] += near * np.sin(np.pi * at / length) ** 2 * tone
        start += length + random.uniform(0.02, 0.15)
    noise = 0.003 * random.standard_normal(len(time))
    return (0.2 * wave / np.abs(wave).max() + noise).astype(np.float32)


@pytest.mark.slow
def test_the_pipeline_gives_the_original_s_text(
    real_model: Callable[[str], Path], tmp_path: Path
) -> None:
    path = real_model("whisper-tiny.en")
    reroll.capture(str(path)).save(str(tmp_path / "out"))
    options: dict[str, Any] = {"generate_kwargs": {"max_new_tokens": 12}}
    found = []
    for folder in (path, tmp_path / "out"):
        processor = transformers.AutoProcessor.from_pretrained(folder)
        assert type(processor) is transformers.WhisperProcessor
        transcribe = transformers.pipeline(
            "automatic-speech-recognition", str(folder), dtype=stored_dtype(path), device="cpu"
        )
        assert transcribe.type == "seq2seq_whisper"
        prompt = torch.tensor(processor.get_prompt_ids("a prompt"))
        asked = {"generate_kwargs": {"max_new_tokens": 8, "prompt_ids": prompt}}
        raw = {"sampling_rate": 16000}
        found.append(
            [
                transcribe({"raw": sound(6), **raw}, **options),
                transcribe({"raw": sound(6), **raw}, return_timestamps=True, **options),
                transcribe({"raw": sound(6), **raw}, **asked),
                # longer than one part, by the model and by the pipeline
                transcribe({"raw": sound(33), **raw}, return_timestamps=True, **options),
                transcribe({"raw": sound(33), **raw}, chunk_length_s=20, **options),
            ]
        )
    assert found[1] == found[0]
    assert all(each["text"] for each in found[0])
