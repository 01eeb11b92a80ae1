"""Programs in another dtype: narrowed, they are what a capture in half precision gives."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch
import transformers

import reroll
from reroll.errors import UsageError
from reroll.rewrite.capture.export import rolled
from reroll.rewrite.ir.dtypes import dtype_of, retype, without_casts
from reroll.rewrite.ir.interpret import run
from reroll.rewrite.ir.ops import WIDEN
from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.text.compare import diff, same
from reroll.rewrite.ir.weights import WeightTable
from tests import captured

pytestmark = pytest.mark.usefixtures("captured_once")

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))


@cache
def wide(name: str) -> Program:
    """A capture in fp32 that knows half precision."""
    return reroll.capture(captured.model(name))


@cache
def in_half(name: str, half: torch.dtype) -> Any:
    """The model as `from_pretrained(dtype=half)` loads it."""
    own = captured.model(name)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(half)
        made = type(own)(own.config)
    finally:
        torch.set_default_dtype(before)
    made.load_state_dict(own.state_dict())
    return made.eval()


@pytest.mark.parametrize(
    ("name", "half"),
    [("llama", BF16), ("llama", F16), pytest.param("gemma3", BF16, marks=pytest.mark.slow)],
)
def test_narrowed_is_captured_in_half_precision(name: str, half: torch.dtype) -> None:
    narrow, own = retype(wide(name), half), reroll.capture(in_half(name, half))
    bare = [p.with_weights(WeightTable()) for p in (own, narrow)]
    # gemma's scale of embeddings, made in half precision there, is rounded where it is read
    rounded = [line for line in diff(*bare).splitlines() if line[:1] in "+-" and line[3:4] != " "]
    assert len(rounded) <= (0 if name != "gemma3" else 3 * 2)
    assert {w.meta.dtype for w in narrow.weights.values() if w.trainable} == {half}
    results = [run(p, {"input_ids": IDS})["logits"] for p in (narrow, own)]
    assert results[0].dtype == half
    assert torch.equal(*results)


@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_encoder_decoders_are_narrowed_to_what_they_are_captured_as(name: str) -> None:
    # T5 writes its buckets in place, and Whisper's heads are made contiguous
    program = wide(name)
    assert program.halves == (BF16,)
    narrow, own = retype(program, BF16), reroll.capture(in_half(name, BF16))
    assert not diff(own.with_weights(WeightTable()), narrow.with_weights(WeightTable()))
    inputs = {"decoder_input_ids": IDS, "input_ids": IDS}
    if name == "whisper":
        sound = torch.randn(2, 80, 100, generator=torch.Generator().manual_seed(0))
        inputs = {"decoder_input_ids": IDS, "input_features": sound.to(BF16)}
    results = [run(p, inputs)["logits"] for p in (narrow, own)]
    assert results[0].dtype == BF16
    assert torch.equal(*results)


def test_a_capture_in_fp32_computes_what_one_without_half_precision_does() -> None:
    for name in ("llama", "gemma3"):
        program = wide(name)
        # of the same object: `captured` may have come from another process
        plain = rolled(reroll.capture(captured.model(name), roll=False))
        assert set(program.halves) == {BF16, F16}
        assert same(without_casts(program), without_casts(plain))
        assert torch.equal(
            run(program, {"input_ids": IDS})["logits"], run(plain, {"input_ids": IDS})["logits"]
        )


def test_what_asks_for_fp32_itself_survives_widening() -> None:
    own = reroll.capture(captured.model("llama", BF16))
    program = retype(own, F32)
    assert any(n.target is WIDEN for n in program.graph.nodes)
    assert program.halves == (BF16, F16)
    again = retype(program, BF16)
    assert not diff(own.with_weights(WeightTable()), again.with_weights(WeightTable()))
    assert torch.equal(
        run(own, {"input_ids": IDS})["logits"], run(again, {"input_ids": IDS})["logits"]
    )


def test_constants_that_were_rounded_are_named(caplog: pytest.LogCaptureFixture) -> None:
    retype(retype(wide("gemma3"), torch.bfloat16), torch.float32)
    assert "rounded" not in caplog.text
    rounded = reroll.capture(captured.model("gemma3", torch.bfloat16))
    retype(rounded, torch.float32)
    assert "rounded to bfloat16" in caplog.text
    assert "model.embed_tokens.embed_scale" in caplog.text


def test_it_is_written_down() -> None:
    text = str(wide("llama"))
    assert text.startswith("program dtype=f32 halves=[bf16, f16] model=")
    assert str(reroll.parse(text)) == text


def test_passes_keep_it() -> None:
    passes = "linearize(mixer=gla, window=4, sinks=1)"
    narrow = retype(reroll.run_passes(wide("llama"), passes, measure=False), BF16)
    own = reroll.run_passes(reroll.capture(in_half("llama", BF16)), passes, measure=False)
    assert not diff(own.with_weights(WeightTable()), narrow.with_weights(WeightTable()))


@pytest.mark.parametrize("passes", ["", "tie(blocks=2), relax(rank=4)", "window(size=4, sinks=1)"])
def test_a_model_is_brought_to_a_dtype_and_back(passes: str) -> None:
    program = reroll.run_passes(wide("llama"), passes, measure=False)
    model, expected = program.to_module(), program.to_module(dtype=BF16)
    original = model(IDS).logits
    assert model.to(BF16) is model
    assert (model.dtype, model.program.dtype, model.config.dtype) == (BF16, BF16, BF16)
    assert model(IDS).logits.dtype == BF16
    assert torch.equal(model(IDS).logits, expected(IDS).logits)
    assert model.state_dict().keys() == expected.state_dict().keys()
    frozen = {n: t.dtype for n, t in model.state_dict().items() if "inv_freq" in n}
    assert set(frozen.values()) == {F32}
    options = {"max_new_tokens": 3, "pad_token_id": 0, "do_sample": False}
    for kind in ({}, {"cache_implementation": "static"}):
        tokens = [m.generate(IDS, **options, **kind) for m in (model, expected)]
        assert torch.equal(*tokens)
    assert model.to_program().dtype == BF16
    wider = model.float()(IDS).logits
    assert wider.dtype == F32
    torch.testing.assert_close(wider, original, rtol=0.1, atol=0.1)


def test_half_and_bfloat16_and_a_wrapper_around_the_model() -> None:
    model = wide("llama").to_module()
    assert model.half()(IDS).logits.dtype == F16
    assert torch.nn.Sequential(model).bfloat16()[0](IDS).logits.dtype == BF16
    with pytest.raises(UsageError, match="no dtype to compute in"):
        model.double()
    assert model(IDS).logits.dtype == BF16


def test_autocast_goes_on_working() -> None:
    model = wide("llama").to_module()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(IDS).logits
    assert logits.isfinite().all()


def test_what_is_not_known_is_refused() -> None:
    with pytest.raises(UsageError, match="capture the original model in it") as error:
        captured.captured("llama").to_module().to(BF16)
    assert "does not run in bfloat16" in str(error.value)


def test_a_checkpoint_whose_configuration_names_no_dtype(tmp_path: Any) -> None:
    model = captured.model("llama", BF16)
    path = tmp_path / "model"
    model.save_pretrained(path)
    config = path / "config.json"
    config.write_text(
        "\n".join(line for line in config.read_text().splitlines() if '"dtype"' not in line)
    )
    assert transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto").dtype == BF16
    program = reroll.capture(str(path))
    assert program.dtype == BF16
    program.save(str(tmp_path / "out"))
    assert reroll.capture(str(tmp_path / "out"), dtype="float32").dtype == F32


def test_of_several_dtypes_the_first_by_name_counts(tmp_path: Any) -> None:
    model = captured.llama(tie_word_embeddings=False).to(BF16)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = parameter.data.float()
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    data = {k: v for k, v in json.loads(file.read_text()).items() if k != "dtype"}
    file.write_text(json.dumps(data))
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert reroll.capture(str(tmp_path)).dtype == opened.dtype == BF16


@pytest.mark.parametrize("value", ["nonsense", "int8", "float64", torch.int64, 3, {"": "bfloat16"}])
def test_other_values_are_no_dtypes(value: Any) -> None:
    with pytest.raises(UsageError, match="use float32, bfloat16 or float16"):
        dtype_of(value)
