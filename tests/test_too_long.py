"""Texts longer than a model's learned positions, ids without a row, and texts that are none."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import reroll
from reroll.errors import UsageError
from reroll.evaluate.compare import compare
from reroll.evaluate.generation import generate, open_generator
from reroll.evaluate.suite import choose, evaluate
from reroll.evaluate.tokenizing import read_text
from reroll.recover import recipe as recipes
from reroll.recover import recover
from reroll.recover.sampling import sampled_texts
from reroll.rewrite.analysis.reach import position_limits
from reroll.rewrite.analysis.samples import sample_text
from tests import tiny

pytestmark = pytest.mark.usefixtures("captured_once")

POSITIONS = 64


def gpt2(layers: int = 2) -> GPT2LMHeadModel:
    config = GPT2Config(
        n_embd=32, n_layer=layers, n_head=4, n_positions=POSITIONS, vocab_size=tiny.WORDS,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return tiny._made(GPT2LMHeadModel, config, 0)


def _opt() -> Any:
    config = OPTConfig(
        hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        word_embed_proj_dim=32, max_position_embeddings=POSITIONS, vocab_size=tiny.WORDS,
    )  # fmt: skip
    return OPTForCausalLM(config).eval()


def _bart() -> Any:
    sizes = {
        f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "ffn_dim")
    }
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = BartConfig(
        d_model=16, max_position_embeddings=POSITIONS, vocab_size=tiny.WORDS, **sizes, **heads
    )
    return BartForConditionalGeneration(config).eval()


def _t5() -> Any:
    config = T5Config(
        d_model=16, d_kv=8, d_ff=16, num_layers=2, num_decoder_layers=2, num_heads=2,
        decoder_start_token_id=0, vocab_size=tiny.WORDS,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


# OPT's positions begin at 2, and its table has two rows more
LIMITS: dict[Any, dict[str, int]] = {
    gpt2: {"input_ids": POSITIONS},
    _opt: {"input_ids": POSITIONS},
    _bart: {"input_ids": POSITIONS, "decoder_input_ids": POSITIONS},
    _t5: {},
    tiny.llama: {},
    tiny.bert: {"input_ids": 128},
}


@pytest.mark.parametrize("make", LIMITS)
def test_the_limit_is_that_of_the_original(make: Any) -> None:
    """Where the original has no row for one token more, and has one for each before it."""
    model = make()
    program = reroll.capture(model)
    assert position_limits(program) == LIMITS[make]
    lowered = program.to_module()
    for name, limit in LIMITS[make].items():
        ids = torch.full((1, limit), 5)
        rest = {n: ids[:, :4] for n in ("input_ids", "decoder_input_ids") if n in LIMITS[make]}
        for each in (model, lowered):
            with torch.no_grad():
                each(**{**rest, name: ids})
        # BERT's own buffers are as long as its table
        with pytest.raises((IndexError, RuntimeError)):
            model(**{**rest, name: torch.full((1, limit + 1), 5)})
        with pytest.raises(UsageError, match=f"{name}: {limit + 1} tokens"):
            lowered(**{**rest, name: torch.full((1, limit + 1), 5)})


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(gpt2(), tmp_path_factory.mktemp("long") / "model", tiny.tokenizer())


@pytest.fixture(scope="module")
def converted(original: Path) -> Path:
    reroll.capture(str(original)).save(str(original.with_name("out")))
    return original.with_name("out")


@pytest.fixture(scope="module")
def text(original: Path) -> Path:
    file = original.with_name("text.txt")
    file.write_text(sample_text(), encoding="utf-8")
    return file


def test_decoding_across_the_limit(converted: Path) -> None:
    model = reroll.load(converted).to_module()
    ids = torch.full((1, POSITIONS - 2), 5)
    # the last token is not read
    assert model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None).shape[1] == 65
    with pytest.raises(UsageError, match=r"65 tokens .* 64 positions"):
        model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)


@pytest.mark.parametrize("new", [1, POSITIONS])
def test_prompts_that_leave_no_room(original: Path, converted: Path, new: int) -> None:
    prompt = "word " * (100 if new == 1 else 2)
    for path in (original, converted):
        with pytest.raises(UsageError, match=f"positions for, {POSITIONS}") as told:
            generate(*open_generator(str(path)), [prompt], max_new_tokens=new)
        assert "shorter prompt" in str(told.value.hint)


def test_windows_are_cut_where_nobody_chose_their_length(
    original: Path, converted: Path, text: Path
) -> None:
    found = compare(str(original), str(converted), text, max_tokens=256)
    assert found["inputs"]["length"] == POSITIONS
    assert found["max_abs_error"] == pytest.approx(0, abs=1e-4)
    with pytest.raises(UsageError, match=r"65 tokens .* 64 positions"):
        compare(str(original), str(converted), text, length=POSITIONS + 1)


def test_every_measure_keeps_to_the_positions(original: Path, converted: Path, text: Path) -> None:
    options = "speed(rounds=1, decode=4), perplexity(tokens=256), agreement(tokens=256), "
    options += "generation(prompts=2), recall, copying, state_tracking, listops, cost"
    found = evaluate(str(converted), str(original), choose(options, "quick"), text=text)
    for name, each in found["measures"].items():
        assert each["status"] in ("done", "skipped"), (name, each)
    for name in ("perplexity", "agreement"):
        contexts = found["measures"][name]["result"]["model"]["contexts"]
        assert [c["context"] for c in contexts] == [POSITIONS]
    assert found["measures"]["generation"]["result"]["new"] < POSITIONS


def test_rows_to_train_on(original: Path, converted: Path, text: Path, tmp_path: Path) -> None:
    settings = {"length": POSITIONS + 1, "batch": 2, "held_rows": 2, "stages": ["tune"]}
    with pytest.raises(UsageError, match="option length: 65 tokens"):
        recover(
            str(converted), tmp_path / "out", data=[text],
            recipe=recipes.parse({"recover": settings}), tokens=500,
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_texts_to_sample(converted: Path) -> None:
    model = reroll.load(converted).to_module()
    with pytest.raises(UsageError, match="positions for"):
        next(sampled_texts(model, tiny.tokenizer(), tokens=100, length=POSITIONS + 1, batch=1))


def test_a_rotary_model_goes_on_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny.llama(layers=2, max_position_embeddings=32)
    lowered = reroll.capture(model).to_module()
    ids = torch.randint(3, tiny.WORDS, (1, 40), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(lowered(ids).logits, model(ids).logits, atol=1e-4)
    logging.getLogger("transformers").propagate = True
    said = []
    for each in (model, lowered):
        caplog.clear()
        transformers.logging.get_logger("transformers").warning_once.cache_clear()
        each.generate(ids, max_new_tokens=2, do_sample=False, eos_token_id=None)
        said.append([r.message for r in caplog.records if "maximum length (32)" in r.message])
    assert said[0]
    assert said[0] == said[1]


def test_ids_that_no_table_has(converted: Path) -> None:
    model = reroll.load(converted).to_module()
    for bad in (-1, tiny.WORDS):
        ids = torch.tensor([[3, bad, 4]])
        with pytest.raises(UsageError, match=f"input_ids: there is no token {bad} "):
            model(ids)
        with pytest.raises(UsageError, match=f"there is no token {bad} "):
            model.generate(ids, max_new_tokens=2)


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    path = tiny.save(tiny.llama(layers=2, vocab_size=260), tmp_path / "m", tiny.tokenizer())
    reroll.capture(str(path)).save(str(tmp_path / "out"))
    for name in (path, tmp_path / "out"):
        with pytest.raises(UsageError, match="in a vocabulary of 260"):
            generate(*open_generator(str(name)), [sample_text()[:200]], max_new_tokens=2)
    with pytest.raises(UsageError, match="in a vocabulary of 260"):
        compare(str(path), str(tmp_path / "out"), length=64, max_tokens=128)


def test_bytes_that_are_no_text(converted: Path, tmp_path: Path) -> None:
    file = tmp_path / "latin.txt"
    # behind the first piece that is read, with a character across the border
    file.write_bytes(b"a" * (2**20 - 1) + "é".encode() + b"ab\xe9 and more")
    with pytest.raises(UsageError, match=f"byte {2**20 + 3} ") as told:
        read_text(file)
    assert told.value.where == str(file)
    assert "iconv" in str(told.value.hint)
    module, tokenizer = open_generator(reroll.load(converted))
    with pytest.raises(UsageError, match="byte 3 "):
        generate(module, tokenizer, [b"abc\xe9".decode(errors="surrogateescape")])
