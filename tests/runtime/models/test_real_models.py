"""Real models lowered, beside transformers: the same tokens, losses, gradients and embeddings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import reroll
from reroll.rewrite.analysis import tolerances
from tests.real import stored_dtype

pytestmark = pytest.mark.slow

PROMPTS = [
    "The capital of France is",
    "Write a short poem about the sea, and about the ships that cross it in winter:",
    "def fibonacci(n):",
]


@pytest.fixture(scope="module")
def smollm2(real_model: Callable[[str], Path]) -> tuple[Any, Any, Any]:
    """Tokenizer with left padding, original and lowered model."""
    path = str(real_model("smollm2-135m-instruct"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, padding_side="left")
    original = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return tokenizer, original.eval(), reroll.capture(path, dtype="float32").to_module()


def generate(tokenizer: Any, model: Any, **options: Any) -> torch.Tensor:
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    torch.manual_seed(0)
    wishes = {"max_new_tokens": 64, "do_sample": False, **options}
    return model.generate(**inputs, **wishes)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3, "max_new_tokens": 24},
        {"do_sample": True, "temperature": 0.9, "top_p": 0.95},
        {"prefill_chunk_size": 4},
        {"use_cache": False, "max_new_tokens": 24},
        {"cache_implementation": "static"},
    ],
    ids=["greedy", "beams", "sampling", "chunked prefill", "no cache", "static cache"],
)
def test_generation(smollm2: tuple[Any, Any, Any], options: dict[str, Any]) -> None:
    tokenizer, original, lowered = smollm2
    expected = generate(tokenizer, original, **options)
    assert torch.equal(expected, generate(tokenizer, lowered, **options))


def test_loss_and_gradients_with_and_without_checkpointing(
    smollm2: tuple[Any, Any, Any],
) -> None:
    tokenizer, original, lowered = smollm2
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    grads = []
    for model, checkpointing in ((original, False), (lowered, False), (lowered, True)):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        loss = model(**inputs, labels=labels, use_cache=False).loss
        loss.backward()
        grads.append((loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}))
        model.zero_grad()
        model.eval()
    lowered.gradient_checkpointing_disable()
    assert grads[0][1].keys() == grads[1][1].keys()
    for loss, found in grads[1:]:
        torch.testing.assert_close(loss, grads[0][0])
        for name, expected in grads[0][1].items():
            error = (found[name] - expected).norm() / expected.norm()
            assert error < 1e-4, name


def test_saved_and_loaded(smollm2: tuple[Any, Any, Any], tmp_path: Path) -> None:
    tokenizer, original, lowered = smollm2
    lowered.program.save(str(tmp_path / "a"))
    reroll.load(tmp_path / "a").save(str(tmp_path / "b"))
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert "tokenizer.json" in names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    own = transformers.AutoTokenizer.from_pretrained(tmp_path / "a", padding_side="left")
    expected = generate(tokenizer, original, max_new_tokens=8)
    assert torch.equal(expected, generate(own, again, max_new_tokens=8))


def test_sliding_windows(real_model: Callable[[str], Path]) -> None:
    path = str(real_model("gemma-3-270m"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, padding_side="left")
    original = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    lowered = reroll.capture(path, dtype="float32").to_module()
    # beyond the window of 512
    prompts = [" ".join(PROMPTS * 25), PROMPTS[0]]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    assert inputs["input_ids"].shape[1] > 600
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    expected = original.generate(**inputs, **options)
    assert torch.equal(expected, lowered.generate(**inputs, **options))
    chunked = lowered.generate(**inputs, **options, prefill_chunk_size=200)
    assert torch.equal(expected, chunked)


def test_sentence_embeddings(real_model: Callable[[str], Path]) -> None:
    path = real_model("minilm-l6-v2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    original = transformers.AutoModel.from_pretrained(path).eval()
    kept = inputs["attention_mask"].bool()
    actual = reroll.capture(str(path)).to_module()(**inputs).last_hidden_state[kept]
    expected = original(**inputs).last_hidden_state[kept]
    assert actual.dtype == expected.dtype == stored_dtype(path)
    error = tolerances.relative_rms(actual, expected)
    assert error <= tolerances.forward(actual.dtype)


def test_images(real_model: Callable[[str], Path]) -> None:
    path = real_model("dinov2-small")
    original = transformers.AutoModel.from_pretrained(path).eval()
    pixels = torch.randn(1, 3, 518, 518, generator=torch.Generator().manual_seed(0))
    pixels = pixels.to(stored_dtype(path))
    with torch.no_grad():
        actual, expected = reroll.capture(str(path)).to_module()(pixels), original(pixels)
    assert actual.pooler_output.dtype == expected.pooler_output.dtype == stored_dtype(path)
    error = tolerances.relative_rms(actual.pooler_output, expected.pooler_output)
    assert error <= tolerances.forward(stored_dtype(path))


def test_speech(real_model: Callable[[str], Path]) -> None:
    path = real_model("whisper-tiny.en")
    original = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(path).eval()
    lowered = reroll.capture(str(path)).to_module()
    features = torch.randn(2, 80, 3000, generator=torch.Generator().manual_seed(0))
    features = features.to(stored_dtype(path))
    options: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False}
    plain = transformers.GenerationMixin.generate
    expected = plain(original, input_features=features, **options)
    assert torch.equal(expected, plain(lowered, input_features=features, **options))
