"""`resize_token_embeddings` gives what transformers gives, and everything else follows."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import reroll
from reroll.errors import UsageError
from reroll.export.onnx import Onnx
from reroll.rewrite.pipeline.manager import run_passes
from tests import captured, tiny

pytestmark = pytest.mark.usefixtures("captured_once")

IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
SIZE = 64


def lowered(name: str, passes: str = "") -> Any:
    program = captured.captured(name)
    if passes:
        program = run_passes(program, passes, measure=False, tokenizer=tiny.tokenizer())
    return program.to_module().eval()


@torch.no_grad()
def output(model: Any, ids: Tensor = IDS) -> Tensor:
    if model.main_input_name == "input_features":
        sounds = torch.randn(2, 80, 100, generator=torch.Generator().manual_seed(0))
        return model(input_features=sounds, decoder_input_ids=ids)[0]
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(1)
    return model(**inputs)[0]


def again(model: Any, path: Path) -> Any:
    model.save_pretrained(path)
    return type(model).from_pretrained(path).eval()


NAMES = ["llama", "qwen2", "gemma3", "gpt2", "t5", "bart", "bert", "roberta_decoder", "whisper"]


@pytest.mark.parametrize("options", [{"new_num_tokens": 70}, {"new_num_tokens": 61}])
@pytest.mark.parametrize("name", NAMES)
def test_it_is_what_transformers_makes(name: str, options: Any, tmp_path: Path) -> None:
    original, model = copy.deepcopy(captured.model(name)).eval(), lowered(name)
    for each in (original, model):
        torch.manual_seed(0)
        table = each.resize_token_embeddings(**options)
        assert table is each.get_input_embeddings()
        assert table.num_embeddings == options["new_num_tokens"] == each.config.vocab_size
    assert torch.equal(original.get_input_embeddings().weight, model.get_input_embeddings().weight)
    expected = output(model)
    torch.testing.assert_close(expected, output(original), rtol=1e-4, atol=1e-5)
    ids = IDS.clone()
    ids[0, 0] = options["new_num_tokens"] - 1
    torch.testing.assert_close(output(model, ids), output(original, ids), rtol=1e-4, atol=1e-5)
    found = again(model, tmp_path)
    assert torch.equal(output(found), expected)
    assert found.config.vocab_size == options["new_num_tokens"]
    assert torch.equal(output(model.program.to_module().eval()), expected)
    with pytest.raises(UsageError, match=f"no token {options['new_num_tokens']}"):
        output(model, torch.full_like(IDS, options["new_num_tokens"]))


@pytest.mark.parametrize("mean", [True, False])
def test_the_rows_that_are_new(mean: bool) -> None:
    """An untied head gets its own, of the head's mean."""
    original, model = copy.deepcopy(captured.model("qwen2")).eval(), lowered("qwen2")
    for each in (original, model):
        torch.manual_seed(0)
        each.resize_token_embeddings(66, pad_to_multiple_of=16, mean_resizing=mean)
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert table.shape[0] == head.shape[0] == 80
    assert torch.equal(head, original.get_output_embeddings().weight)
    near = (head[SIZE:] - head[:SIZE].mean(0)).abs().max() < 1e-3
    assert bool(near) == mean


def test_nothing_happens_where_nothing_changes() -> None:
    model = lowered("llama")
    assembly, tensor = model._assembly, model.get_input_embeddings().weight
    for arguments in ((), (SIZE,), (None, 32), (60, 64)):
        assert model.resize_token_embeddings(*arguments) is model.get_input_embeddings()
    assert model._assembly is assembly
    assert model.get_input_embeddings().weight is tensor


@pytest.mark.parametrize(
    "passes",
    [
        "tie(blocks=2), relax(rank=4)",
        "linearize(mixer=gated_deltanet, window=4, sinks=1)",
        "insert_exits(at=[2], criterion=margin)",
        "insert_exits(at=[2], criterion=margin, head=own)",
    ],
)
def test_after_passes(passes: str, tmp_path: Path) -> None:
    """The first tokens keep their logits, and a tied head stays tied."""
    model = lowered("llama", passes)
    before = output(model)
    model.resize_token_embeddings(70)
    expected = output(model)
    torch.testing.assert_close(expected[..., :SIZE], before)
    assert torch.equal(output(again(model, tmp_path)), expected)
    if "own" not in passes:
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    model.load_weights()
    assert torch.equal(output(model), expected)
    loss = model(IDS, labels=IDS + 5).loss
    loss.backward()
    assert model.get_input_embeddings().weight.grad.shape == (70, 32)
    assert model.generate(IDS, max_new_tokens=4, do_sample=False).shape[0] == 2


def test_it_goes_on_to_other_forms(tmp_path: Path) -> None:
    """A pass, a directory, ONNX, and adapters."""
    model = lowered("llama", "tie(blocks=2)")
    model.resize_token_embeddings(70)
    expected = output(model)
    program = model.to_program()
    folded = run_passes(program, "fold_norms", measure=False).to_module().eval()
    torch.testing.assert_close(output(folded), expected, rtol=1e-4, atol=1e-5)
    program.save(str(tmp_path / "saved"))
    loaded = reroll.load(tmp_path / "saved")
    assert torch.equal(output(loaded.to_module().eval()), expected)
    (tmp_path / "onnx").mkdir()
    checks = Onnx(check=True).write(loaded, tmp_path / "onnx")["graphs"]
    assert all(each["check"]["relative_rms_error"] < 1e-5 for each in checks.values())
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "embed_tokens"]))
    assert torch.equal(output(adapted), expected)


def test_half_precision_before_and_after() -> None:
    first, second = (reroll.capture(captured.llama()).to_module().eval() for _ in range(2))
    second.load_state_dict(first.state_dict())
    unchanged = output(copy.deepcopy(first).to(torch.bfloat16))
    first.resize_token_embeddings(70)
    first.to(torch.bfloat16)
    second.to(torch.bfloat16).resize_token_embeddings(70)
    for model in (first, second):
        assert model.get_output_embeddings().weight.dtype == torch.bfloat16
        assert torch.equal(output(model)[..., :SIZE], unchanged)
        assert output(model).shape[-1] == 70


def test_a_head_that_was_untied(tmp_path: Path) -> None:
    model = lowered("llama")
    model.set_output_embeddings(nn.Linear(32, SIZE, bias=False))
    before = output(model)
    model.resize_token_embeddings(70)
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert table is not head
    torch.testing.assert_close(output(model)[..., :SIZE], before)
    assert torch.equal(output(again(model, tmp_path)), output(model))
    assert torch.equal(output(model.program.to_module().eval()), output(model))


def test_a_masked_head_has_a_bias(tmp_path: Path) -> None:
    config = transformers.BertConfig(**captured.TEXT, intermediate_size=48)
    original = transformers.BertForMaskedLM(config).eval()
    with torch.no_grad():
        original.cls.predictions.bias.normal_()
    model = reroll.capture(copy.deepcopy(original)).to_module().eval()
    for each in (original, model):
        torch.manual_seed(0)
        each.resize_token_embeddings(70)
    torch.testing.assert_close(output(model), output(original), rtol=1e-4, atol=1e-5)
    assert torch.equal(output(again(model, tmp_path)), output(model))


def test_what_is_added_to_logits_follows(tmp_path: Path) -> None:
    sizes = {f"{side}_{n}": 2 for side in ("encoder", "decoder") for n in ("layers", "ffn_dim")}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = transformers.BartConfig(d_model=16, vocab_size=SIZE, **sizes, **heads)
    original = transformers.BartForConditionalGeneration(config).eval()
    original.final_logits_bias.normal_()
    model = reroll.capture(copy.deepcopy(original)).to_module().eval()
    for each in (original, model):
        torch.manual_seed(0)
        each.resize_token_embeddings(70)
    torch.testing.assert_close(output(model), output(original), rtol=1e-4, atol=1e-5)
    assert torch.equal(output(again(model, tmp_path)), output(model))


def test_a_classifier_keeps_its_labels() -> None:
    config = transformers.BertConfig(**captured.TEXT, intermediate_size=48, num_labels=SIZE)
    original = transformers.BertForTokenClassification(config).eval()
    model = reroll.capture(original).to_module().eval()
    before = output(model)
    model.resize_token_embeddings(70)
    assert torch.equal(output(model), before)


REFUSED: list[tuple[Any, Any, str]] = [
    (lambda m: None, 0, "new_num_tokens must be"),
    (lambda m: None, 70.5, "new_num_tokens must be"),
    (lambda m: None, True, "new_num_tokens must be"),
    (lambda m: get_peft_model(m, LoraConfig(target_modules=["lm_head"])), 70, "has an adapter"),
]


@pytest.mark.parametrize(("change", "rows", "said"), REFUSED)
def test_it_is_refused_before_anything_changes(change: Any, rows: Any, said: str) -> None:
    model = lowered("llama")
    change(model)
    before, program = output(model), model.program
    with pytest.raises(UsageError, match=said):
        model.resize_token_embeddings(rows)
    assert torch.equal(output(model), before)
    assert model.program is program
    assert model.config.vocab_size == SIZE


def test_a_decoder_with_a_table_of_its_own(tmp_path: Path) -> None:
    """transformers gives it the encoder's, which is another function."""
    original = copy.deepcopy(captured.model("t5"))
    config = copy.deepcopy(original.config)
    config.tie_word_embeddings = False
    torch.manual_seed(0)
    model = reroll.capture(type(original)(config).eval()).to_module().eval()
    before = output(model)
    model.resize_token_embeddings(70)
    torch.testing.assert_close(output(model)[..., :SIZE], before)
    assert output(model, torch.full_like(IDS, 69)).shape[-1] == 70
    assert torch.equal(output(again(model, tmp_path)), output(model))


def test_a_model_without_tokens_has_none_to_resize() -> None:
    with pytest.raises(NotImplementedError, match="no input embeddings"):
        lowered("vit").resize_token_embeddings(70)
