"""`attentions` are the original's, in number, shape and value, wherever its layers stand."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
import transformers

import reroll
from reroll.errors import UsageError
from reroll.rewrite.capture.export import capture
from reroll.rewrite.ir.hidden import WEIGHTS, drop_marks
from tests.captured import SPECIAL, TEXT, captured, flat, llama, model

pytestmark = pytest.mark.usefixtures("captured_once")

IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
MASK[0, :3] = 0
ASK = {"output_attentions": True}


@cache
def eager(name: str) -> Any:
    """The original with the attention that gives weights."""
    original = copy.deepcopy(model(name))
    original.set_attn_implementation("eager")
    return original


def same(actual: Any, expected: Any) -> None:
    """As many entries, and each the same."""
    assert len(actual) == len(expected) > 0
    for got, want in zip(actual, expected, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


# grouped heads, windows, latent keys, ALiBi, parallel branches, convolutions between attentions
@pytest.mark.parametrize(
    "name", ["llama", "gemma3", "smollm3", "gpt2", "gpt_neox", "bloom", "lfm2", "indexer", "opt"]
)
@torch.no_grad()
def test_causal_models(name: str) -> None:
    lowered = captured(name).to_module()
    for inputs in ({"input_ids": IDS}, {"input_ids": IDS, "attention_mask": MASK}):
        expected = eager(name)(**inputs, **ASK)
        actual = lowered(**inputs, **ASK)
        same(actual.attentions, expected.attentions)
        plain, seen = lowered(**inputs), inputs.get("attention_mask", torch.ones_like(IDS)).bool()
        assert plain.attentions is None
        torch.testing.assert_close(actual.logits[seen], plain.logits[seen], rtol=1e-4, atol=1e-4)


# a BLOOM takes no static cache
@pytest.mark.parametrize(
    ("name", "static"),
    [("llama", False), ("llama", True), ("gemma3", False), ("gemma3", True), ("bloom", False)],
)
@torch.no_grad()
def test_with_a_cache(name: str, static: bool) -> None:
    """The first tokens, then one, then two: behind left padding, and with unfilled slots."""
    found = []
    for made in (captured(name).to_module(), eager(name)):
        past = transformers.DynamicCache(config=made.config)
        if static:
            past = transformers.StaticCache(config=made.config, max_cache_len=16)
        steps, start = [], 0
        for end in (6, 7, 9):
            given = {"attention_mask": MASK[:, :end], "past_key_values": past, "use_cache": True}
            steps += made(IDS[:, start:end], **given, **ASK).attentions
            start = end
        found.append(steps)
    same(*found)


def test_a_long_window_is_written_out() -> None:
    """A window over a text that is much longer is computed as a band, without all scores."""
    ids = torch.randint(3, 64, (1, 200), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        actual = captured("gemma3").to_module()(ids, **ASK).attentions
        same(actual, eager("gemma3")(ids, **ASK).attentions)
    assert actual[0][0, 0, 150, :140].abs().max() == 0


@pytest.mark.parametrize("name", ["bert", "vit", "dinov2", "xlm_roberta"])
@torch.no_grad()
def test_encoders(name: str) -> None:
    given = {"pixel_values": torch.randn(2, 3, 28, 28)} if name == "dinov2" else {"input_ids": IDS}
    given = {"pixel_values": torch.randn(2, 3, 16, 16)} if name == "vit" else given
    lowered = captured(name).to_module()
    same(lowered(**given, **ASK).attentions, eager(name)(**given, **ASK).attentions)


@pytest.mark.parametrize("name", ["t5", "whisper"])
@torch.no_grad()
def test_encoder_and_decoder(name: str) -> None:
    given = {"input_ids": IDS, "attention_mask": MASK}
    if name == "whisper":
        given = {"input_features": torch.randn(2, 80, 100)}
    given["decoder_input_ids"] = IDS[:, :5]
    expected, actual = eager(name)(**given, **ASK), captured(name).to_module()(**given, **ASK)
    for kind in ("encoder_attentions", "decoder_attentions", "cross_attentions"):
        same(actual[kind], expected[kind])
    wanted = [key for key in expected if key not in ("past_key_values",)]
    assert [key for key in actual if key not in ("past_key_values",)] == wanted


@torch.no_grad()
def test_a_base_model_of_encoder_and_decoder() -> None:
    given = {"input_ids": IDS, "decoder_input_ids": IDS[:, :5], **ASK}
    expected, actual = eager("bart")(**given), captured("bart").to_module()(**given)
    for kind in ("encoder_attentions", "decoder_attentions", "cross_attentions"):
        same(actual[kind], expected[kind])


# Whisper's own `generate` returns the weights of some beams alone
@pytest.mark.parametrize(
    ("name", "beams"), [("llama", 1), ("gemma3", 2), ("t5", 1), ("t5", 2), ("whisper", 1)]
)
def test_generation_returns_them(name: str, beams: int) -> None:
    wishes = {
        "max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0,
        "return_dict_in_generate": True, "num_beams": beams, **ASK,
    }  # fmt: skip
    ids = torch.randn(2, 80, 100) if name == "whisper" else IDS
    expected = eager(name).generate(ids, **wishes)
    actual = captured(name).to_module().generate(ids, **wishes)
    assert torch.equal(actual.sequences, expected.sequences)
    kinds = ["decoder_attentions", "cross_attentions"] if "decoder_attentions" in expected else []
    for kind in kinds or ["attentions"]:
        assert len(actual[kind]) == len(expected[kind])
        for got, want in zip(actual[kind], expected[kind], strict=True):
            same(got, want)
    if kinds:
        same(actual.encoder_attentions, expected.encoder_attentions)


@torch.no_grad()
def test_sinks_and_soft_caps() -> None:
    """Sinks take a part of what the weights add up to; they have no column."""
    options = {**TEXT, **SPECIAL, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4}
    configs = [
        transformers.GptOssConfig(
            **options, intermediate_size=32, num_local_experts=2, num_experts_per_tok=1
        ),
        transformers.Gemma2Config(**options, intermediate_size=48, attn_logit_softcapping=2.0),
    ]
    for config in configs:
        torch.manual_seed(0)
        original = transformers.AutoModelForCausalLM.from_config(config).eval()
        for name, parameter in original.named_parameters():
            parameter.data += 0.5 if name.endswith("sinks") else 0.3 * torch.randn_like(parameter)
        lowered = capture(original).to_module()
        original.set_attn_implementation("eager")
        actual = lowered(IDS, attention_mask=MASK, **ASK).attentions
        same(actual, original(IDS, attention_mask=MASK, **ASK).attentions)


def test_flat_and_parsed_programs_have_them() -> None:
    program = captured("gemma3")
    parsed = reroll.parse(str(program), source=program)
    assert str(parsed) == str(program)
    assert "weights(attentions)" in str(program)
    with torch.no_grad():
        expected = eager("gemma3")(IDS, **ASK).attentions
        for each in (parsed, flat("gemma3")):
            same(each.to_module()(IDS, **ASK).attentions, expected)


def test_of_the_backbone_and_as_a_tuple() -> None:
    lowered = captured("llama").to_module()
    with torch.no_grad():
        expected = eager("llama")(IDS, **ASK).attentions
        same(lowered.base_model(IDS, **ASK).attentions, expected)
        same(lowered(IDS, **ASK, return_dict=False)[-1], expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_flow_through_them(checkpointing: bool) -> None:
    """Into the weights that were returned, and from them into the parameters."""
    grads = []
    for made in (copy.deepcopy(eager("llama")), captured("llama").to_module()):
        made.train()
        if checkpointing:
            made.gradient_checkpointing_enable()
        out = made(IDS, output_hidden_states=True, use_cache=False, **ASK)
        if not checkpointing:
            out.attentions[0].retain_grad()
        (out.logits.pow(2).mean() + sum(w.pow(2).mean() for w in out.attentions)).backward()
        found = [p.grad for n, p in made.named_parameters() if n.endswith("q_proj.weight")]
        grads.append(found if checkpointing else [*found, out.attentions[0].grad])
    assert len(grads[0]) == len(grads[1]) >= 4
    for got, want in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


def test_a_pass_that_tells_which_keys_are_seen_changes_them() -> None:
    program = reroll.run_passes(captured("llama"), "window(size=4, sinks=1)", measure=False)
    with torch.no_grad():
        first = program.to_module()(IDS, **ASK).attentions[0]
        full = eager("llama")(IDS, **ASK).attentions[0]
    at = torch.arange(9)
    seen = ((at[:, None] - at < 4) | (at == 0)) & (at[:, None] >= at)
    expected = full * seen
    torch.testing.assert_close(first, expected / expected.sum(-1, keepdim=True))


@pytest.mark.parametrize(
    "passes",
    [
        "tie(blocks=2), relax(rank=4)",
        "insert_exits(at=[2])",
        "fold_norms",
        "loop_core(prelude=1, core=1, coda=1, trips=2)",
    ],
)
def test_passes_keep_them(passes: str) -> None:
    name = "gpt2" if passes == "fold_norms" else "llama"
    program = reroll.run_passes(captured(name), passes, measure=False)
    lowered = program.to_module()
    with torch.no_grad():
        out = lowered(IDS, **ASK)
        weights = out.attentions
        torch.testing.assert_close(out.logits, lowered(IDS).logits, rtol=1e-4, atol=1e-4)
    assert len(weights) == 4
    for each in weights:
        assert each.shape == (2, 4, 9, 9)
        torch.testing.assert_close(each.sum(-1), torch.ones(2, 4, 9))


def test_layers_with_a_recurrence_have_none() -> None:
    passes = "linearize(mixer=gated_deltanet, window=4, sinks=1, layers=[1, 2])"
    program = reroll.run_passes(captured("llama"), passes, measure=False)
    with pytest.raises(UsageError, match="no attention weights to return") as caught:
        program.to_module()(IDS, **ASK)
    assert "layers 1-2" in str(caught.value.hint)


def test_what_is_not_known_is_refused() -> None:
    program = captured("llama").edit()
    drop_marks(program, WEIGHTS)
    with pytest.raises(UsageError, match="no attention weights to return"):
        program.to_module()(IDS, **ASK)
    # hidden states are not concerned
    assert program.to_module()(IDS, output_hidden_states=True).hidden_states


def test_a_configuration_that_asks_for_them_is_kept(tmp_path) -> None:
    original = llama(num_hidden_layers=2, attn_implementation="eager").eval()
    original.config.output_attentions = True
    program = reroll.capture(original)
    program.save(str(tmp_path / "out"))
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.randint(3, 64, (2, 9))
    with torch.no_grad():
        for lowered in (program.to_module(), opened):
            same(lowered(ids).attentions, original(ids).attentions)
            assert lowered(ids, output_attentions=False).attentions is None
            lowered.config.output_attentions = False
            assert lowered(ids).attentions is None
            lowered.config.output_attentions = True
            assert len(lowered(ids).attentions) == 2


@pytest.mark.parametrize("name", ["llama", "bloom"])
@torch.no_grad()
def test_in_half_precision(name: str) -> None:
    original = copy.deepcopy(eager(name))
    lowered = reroll.capture(original).to_module(dtype="bfloat16")
    original.to(torch.bfloat16)
    expected = original(IDS, attention_mask=MASK, **ASK).attentions
    actual = lowered(IDS, attention_mask=MASK, **ASK).attentions
    assert [w.dtype for w in actual] == [torch.bfloat16] * 4
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", ["llama", "gemma3", "t5"])
@torch.no_grad()
def test_asking_for_them_changes_no_logit(name: str) -> None:
    lowered = captured(name, *([] if name == "t5" else [torch.bfloat16])).to_module()
    labels = {"decoder_input_ids": IDS} if name == "t5" else {}
    plain = lowered(IDS, attention_mask=MASK, **labels).logits
    assert torch.equal(lowered(IDS, attention_mask=MASK, **labels, **ASK).logits, plain)
