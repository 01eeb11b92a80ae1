"""`compare` against numbers computed in the plainest way, and its refusals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

import reroll
from reroll.errors import RerollError, UsageError
from reroll.evaluate import compare as module
from reroll.evaluate.compare import compare
from reroll.evaluate.tokenizing import make_windows, read_text, special_ids, tokenizer_of
from reroll.rewrite.analysis import tolerances
from reroll.rewrite.analysis.distance import Distance
from reroll.rewrite.analysis.samples import sample_text
from tests import tiny

pytestmark = pytest.mark.usefixtures("captured_once")

REQUIRED = {
    "max_abs_logit_error", "relative_rms_error", "kl", "top1_agreement", "perplexity",
    "parameters", "state_bytes", "tokens",
}  # fmt: skip
LENGTH = 32


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.llama(), tmp_path_factory.mktemp("a"), tiny.tokenizer(prefix=True))


@pytest.fixture(scope="module")
def out_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("b") / "out"
    reroll.run_passes(reroll.capture(str(model_dir)), "tie(blocks=2)", measure=False).save(str(out))
    return out


@pytest.fixture(scope="module")
def found(model_dir: Path) -> dict[str, Any]:
    return compare(str(model_dir), tiny.llama(seed=1), length=LENGTH, max_tokens=10 * LENGTH)


def test_keys_of_the_public_interface(found: dict[str, Any]) -> None:
    assert set(found) >= REQUIRED
    for key in ("perplexity", "parameters"):
        assert set(found[key]) == {"a", "b"}
    assert set(found["state_bytes"]) == {"1024", "4096"}
    assert set(found["state_bytes"]["1024"]) == {"a", "b"}
    json.dumps(found, allow_nan=False)


def test_measures_what_a_plain_computation_gives(model_dir: Path, found: dict[str, Any]) -> None:
    windows = make_windows(
        sample_text(), tiny.tokenizer(prefix=True), LENGTH, 10 * LENGTH, closing=False
    )
    ids = windows.ids
    assert ids.shape == (10, LENGTH)
    assert found["tokens"] == ids.numel()
    with torch.no_grad():
        a, b = (tiny.llama(seed=s)(input_ids=ids).logits.double() for s in (0, 1))
    assert found["max_abs_logit_error"] == pytest.approx((a - b).abs().max().item(), rel=1e-5)
    error = ((a - b).norm() / a.norm()).item()
    assert found["relative_rms_error"] == pytest.approx(error, rel=1e-5)
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    assert found["kl"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-5)
    agreement = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert found["top1_agreement"] == pytest.approx(agreement)
    for side, log in (("a", p), ("b", q)):
        loss = -log[:, :-1].gather(2, ids[:, 1:, None]).mean().item()
        assert found["perplexity"][side] == pytest.approx(math.exp(loss), rel=1e-5)


def test_state_is_that_of_the_cache(model_dir: Path, found: dict[str, Any]) -> None:
    # layers, keys and values, KV heads, head_dim, fp32
    assert found["state_bytes"]["1024"]["a"] == 4 * 2 * 2 * 8 * 4 * 1024


def test_state_of_a_window_is_that_of_the_window() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    config = Gemma2Config(vocab_size=64, sliding_window=16, **sizes)
    model = Gemma2ForCausalLM(config).eval()
    found = compare(model, reroll.capture(model), length=LENGTH, max_tokens=LENGTH)
    for sides in found["state_bytes"].values():
        assert sides["a"] == sides["b"]
    # one layer keeps all tokens and one the last 16: keys and values, KV heads, head_dim, fp32
    token = 2 * config.num_key_value_heads * 8 * 4
    assert found["state_bytes"]["1024"]["a"] == token * (1024 + 16)


def test_logits_that_are_too_many_come_in_pieces(
    model_dir: Path, found: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BUDGET", 4 * tiny.WORDS * 7)
    pieces = compare(str(model_dir), tiny.llama(seed=1), length=LENGTH, max_tokens=10 * LENGTH)
    for key in ("max_abs_logit_error", "relative_rms_error", "kl", "top1_agreement", "tokens"):
        assert pieces[key] == pytest.approx(found[key], rel=1e-5), key
    assert pieces["perplexity"] == pytest.approx(found["perplexity"], rel=1e-5)


def test_a_model_is_at_no_distance_from_itself(model_dir: Path) -> None:
    found = compare(str(model_dir), str(model_dir), length=LENGTH, max_tokens=128)
    assert found["max_abs_logit_error"] == 0
    assert found["kl"] == 0
    assert found["top1_agreement"] == 1
    assert found["perplexity"]["a"] == found["perplexity"]["b"]


def test_a_rolled_model_is_the_same_up_to_rounding(model_dir: Path) -> None:
    found = compare(str(model_dir), reroll.capture(str(model_dir)), length=LENGTH, max_tokens=256)
    assert found["relative_rms_error"] <= 1e-6
    assert found["top1_agreement"] == 1
    assert found["parameters"]["a"] == found["parameters"]["b"]


def test_a_tied_model_is_smaller_and_apart(model_dir: Path, out_dir: Path) -> None:
    found = compare(str(model_dir), str(out_dir), length=LENGTH, max_tokens=128)
    assert found["parameters"]["b"] < found["parameters"]["a"]
    assert found["kl"] > 0
    assert found["inputs"]["prefix_tokens"] == 1
    assert found["attention"] == "eager"


def test_attention_and_dtype_of_the_original(model_dir: Path) -> None:
    options: dict[str, Any] = {"length": LENGTH, "max_tokens": 64}
    found = compare(str(model_dir), str(model_dir), attention="sdpa", dtype="bfloat16", **options)
    assert found["attention"] == "sdpa"
    assert found["dtype"] == {"a": "bfloat16", "b": "bfloat16"}


def test_a_model_without_a_tokenizer_gets_random_tokens() -> None:
    found = compare(tiny.llama(), tiny.llama(seed=1), length=LENGTH, max_tokens=64)
    assert found["inputs"]["kind"] == "random tokens"
    assert found["perplexity"] is None
    assert found["kl"] > 0


def test_encoders_compare_hidden_states(tmp_path: Path) -> None:
    path = tiny.save(tiny.bert(), tmp_path / "bert", tiny.tokenizer(prefix=True, suffix=True))
    found = compare(str(path), tiny.bert(seed=1), length=LENGTH, max_tokens=64)
    assert found["output"] == "last_hidden_state"
    for key in ("max_abs_logit_error", "kl", "top1_agreement", "perplexity", "state_bytes"):
        assert found[key] is None, key
    assert found["relative_rms_error"] > 0.1
    assert found["inputs"]["kind"] == "text"


def test_images_are_random() -> None:
    found = compare(tiny.vit(), tiny.vit(seed=1))
    assert found["inputs"]["kind"] == "random"
    assert found["perplexity"] is None
    same = compare(tiny.vit(), tiny.vit())
    assert same["relative_rms_error"] == 0


def test_refuses_what_cannot_be_compared(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="shapes"):
        compare(str(model_dir), tiny.llama(vocab_size=tiny.WORDS + 1), length=LENGTH, max_tokens=64)
    with pytest.raises(UsageError, match="no output in common"):
        compare(str(model_dir), tiny.vit())
    with pytest.raises(UsageError, match="read different inputs: input_ids and pixel_values"):
        compare(tiny.bert(), tiny.vit())
    with pytest.raises(UsageError, match="not a model"):
        compare(str(model_dir), 3)
    with pytest.raises(RerollError):
        compare(str(model_dir), str(tmp_path))


# ---- text


def test_text_that_is_none(tmp_path: Path) -> None:
    cases = {"missing": None, "binary": b"\xff\xfe\x00", "zeros": b"a\0b", "empty": b" \n"}
    for name, content in cases.items():
        file = tmp_path / name
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(UsageError):
            read_text(file)
    with pytest.raises(UsageError):
        read_text(tmp_path)
    assert read_text("as it is") == "as it is"
    assert read_text(None) == sample_text()


def test_windows_have_the_tokenizers_own_special_tokens() -> None:
    assert special_ids(tiny.tokenizer()) == ([], [])
    assert special_ids(tiny.tokenizer(prefix=True)) == ([0], [])
    both = tiny.tokenizer(prefix=True, suffix=True)
    assert special_ids(both) == ([0], [1])
    ids = make_windows(sample_text(), both, 16, None, closing=True).ids
    assert (ids[:, 0] == 0).all()
    assert (ids[:, -1] == 1).all()
    text = both.decode(ids[:, 1:-1].flatten().tolist())
    assert sample_text().startswith(text)


def test_a_short_text_is_one_short_window() -> None:
    windows = make_windows("one, two, three", tiny.tokenizer(), 512, None, closing=False)
    assert windows.ids.shape[0] == 1
    assert windows.ids.shape[1] < 512
    assert not windows.cut
    with pytest.raises(UsageError, match="fewer than two"):
        make_windows("a", tiny.tokenizer(), 512, None, closing=False)


def test_the_tokenizer_of_a_program(model_dir: Path, out_dir: Path) -> None:
    for path in (model_dir, out_dir):
        found = tokenizer_of(reroll.capture(str(path)))
        assert found is not None
        assert found("a cat")["input_ids"] == tiny.tokenizer(prefix=True)("a cat")["input_ids"]
    assert tokenizer_of(reroll.capture(tiny.llama())) is None


# ---- distance


def test_the_same_infinity_is_no_difference() -> None:
    distance = Distance(logits=True)
    a = torch.tensor([[0.0, 1.0, -math.inf]])
    distance.add(a, a.clone())
    assert distance.largest == 0
    assert distance.kl == 0
    assert distance.relative_rms_error == 0


def test_what_is_not_a_number_is_the_largest_error() -> None:
    distance = Distance(logits=False)
    distance.add(torch.tensor([[1.0], [1.0]]), torch.tensor([[math.nan], [3.0]]))
    distance.add(torch.tensor([[1.0]]), torch.tensor([[2.0]]))
    assert math.isnan(distance.largest)
    assert math.isnan(distance.relative_rms_error)


@pytest.mark.slow
def test_smollm2_rolled_is_the_original(real_model: Callable[[str], Path]) -> None:
    path = real_model("smollm2-135m-instruct")
    program = reroll.capture(str(path), dtype="float32")
    found = compare(str(path), program, max_tokens=1024, dtype="float32")
    assert found["relative_rms_error"] <= tolerances.forward(torch.float32)
    assert found["top1_agreement"] == 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_gemma_gets_its_first_token(real_model: Callable[[str], Path]) -> None:
    """Without `<bos>` at the start of each window its perplexity is more than twice as high."""
    path = real_model("gemma-3-270m")
    found = compare(str(path), str(path), max_tokens=1024, dtype="bfloat16")
    assert found["inputs"]["prefix_tokens"] == 1
    text = sample_text()
    bare = AutoTokenizer.from_pretrained(path, add_bos_token=False)
    without = compare(str(path), str(path), text, max_tokens=1024, dtype="bfloat16", tokenizer=bare)
    assert without["inputs"]["prefix_tokens"] == 0
    assert without["perplexity"]["a"] > 1.5 * found["perplexity"]["a"]
