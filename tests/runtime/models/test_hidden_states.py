"""`hidden_states` are the original's, in number and value, wherever its layers stand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import reroll
from reroll.errors import UsageError
from reroll.rewrite.capture.export import capture
from reroll.rewrite.capture.rolling.split import pack_trips, split_loop
from reroll.rewrite.ir.hidden import drop_marks
from tests.captured import SPECIAL, TEXT, captured, flat, llama, model

pytestmark = pytest.mark.usefixtures("captured_once")

IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
MASK[0, :3] = 0


def same(actual: Any, expected: Any, where: Tensor | None = None) -> None:
    """As many entries, and each the same where the text is no padding."""
    assert len(actual) == len(expected)
    for got, want in zip(actual, expected, strict=True):
        if where is not None:
            got, want = got[where.bool()], want[where.bool()]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


# before norms and behind them, two layers to a trip, learned positions, parallel branches
@pytest.mark.parametrize(
    "name", ["llama", "gemma3", "smollm3", "gpt2", "gpt_neox", "bloom", "lfm2"]
)
def test_causal_models(name: str) -> None:
    inputs = {"input_ids": IDS, "attention_mask": MASK, "output_hidden_states": True}
    lowered = captured(name).to_module()
    with torch.no_grad():
        expected = model(name)(**inputs).hidden_states
        same(lowered(**inputs).hidden_states, expected, MASK)
        # whatever positions have logits
        same(lowered(**inputs, logits_to_keep=1).hidden_states, expected, MASK)


def test_flat_and_parsed_programs_have_them() -> None:
    program = captured("gemma3")
    parsed = reroll.parse(str(program), source=program)
    assert str(parsed) == str(program)
    with torch.no_grad():
        expected = model("gemma3")(IDS, output_hidden_states=True).hidden_states
        for each in (parsed, flat("gemma3")):
            same(each.to_module()(IDS, output_hidden_states=True).hidden_states, expected)


@pytest.mark.parametrize("name", ["bert", "vit", "dinov2"])
def test_encoders(name: str) -> None:
    given = {"pixel_values": torch.randn(2, 3, 28, 28)} if name == "dinov2" else {"input_ids": IDS}
    given = {"pixel_values": torch.randn(2, 3, 16, 16)} if name == "vit" else given
    lowered = captured(name).to_module()
    with torch.no_grad():
        expected = model(name)(**given, output_hidden_states=True).hidden_states
        same(lowered(**given, output_hidden_states=True).hidden_states, expected)


def test_layers_outside_of_the_loop() -> None:
    config = transformers.MistralConfig(
        **{**TEXT, "num_hidden_layers": 5}, **SPECIAL, intermediate_size=48, num_key_value_heads=2
    )
    torch.manual_seed(0)
    original = transformers.MistralForCausalLM(config).eval()
    with torch.no_grad():
        # a layer that does more than the others
        original.model.layers[0].mlp = torch.nn.Sequential(
            original.model.layers[0].mlp, torch.nn.Linear(32, 32), torch.nn.Tanh()
        )
        program = capture(original)
        assert [loop.trips for loop in program.loops] == [4]
        expected = original(IDS, output_hidden_states=True).hidden_states
        same(program.to_module()(IDS, output_hidden_states=True).hidden_states, expected)


def test_encoder_and_decoder() -> None:
    original, lowered = model("t5"), captured("t5").to_module()
    given = {"input_ids": IDS, "decoder_input_ids": IDS[:, :5], "output_hidden_states": True}
    with torch.no_grad():
        expected, actual = original(**given), lowered(**given)
    same(actual.encoder_hidden_states, expected.encoder_hidden_states)
    same(actual.decoder_hidden_states, expected.decoder_hidden_states)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_generation_returns_them(name: str) -> None:
    wishes = {
        "max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0,
        "output_hidden_states": True, "return_dict_in_generate": True,
    }  # fmt: skip
    expected = model(name).generate(IDS, **wishes)
    actual = captured(name).to_module().generate(IDS, **wishes)
    kinds = ["hidden_states"] if name == "llama" else ["decoder_hidden_states"]
    for kind in kinds:
        assert len(actual[kind]) == len(expected[kind])
        for got, want in zip(actual[kind], expected[kind], strict=True):
            same(got, want)
    if name == "t5":
        same(actual.encoder_hidden_states, expected.encoder_hidden_states)


def test_some_of_them_by_number() -> None:
    wish = [0, -1]
    expected = model("llama")(IDS, output_hidden_states=wish).hidden_states
    actual = captured("llama").to_module()(IDS, output_hidden_states=wish).hidden_states
    assert [each is None for each in actual] == [each is None for each in expected]
    torch.testing.assert_close(actual[-1], expected[-1])


def test_gradients_reach_them_through_checkpointing() -> None:
    grads = []
    for made in (copy.deepcopy(model("bert")), captured("bert").to_module()):
        made.train()
        made.gradient_checkpointing_enable()
        for module in made.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        states = made(IDS, output_hidden_states=True).hidden_states
        sum(state.pow(2).mean() for state in states).backward()
        grads.append({n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None})
    name = "attention.self.query.weight"
    for number in range(4):
        (expected,) = (g for n, g in grads[0].items() if n.endswith(f"layer.{number}.{name}"))
        (got,) = (g for n, g in grads[1].items() if f".{number}." in n and n.endswith(name))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_passes_keep_them() -> None:
    passes = "tie(blocks=2), relax(rank=4), window(size=4)"
    program = reroll.run_passes(captured("llama"), passes, measure=False)
    states = program.to_module()(IDS, output_hidden_states=True).hidden_states
    expected = model("llama")(IDS, output_hidden_states=True).hidden_states
    assert len(states) == len(expected)
    torch.testing.assert_close(states[0], expected[0])


def test_cut_and_packed_loops_keep_them() -> None:
    """Before and behind a window of layers, and between those of one trip."""
    program = captured("llama").edit()
    program, pieces = split_loop(program, program.loops[0], [2])
    program, _ = pack_trips(program, pieces[1], 2)
    states = program.to_module()(IDS, output_hidden_states=True).hidden_states
    same(states, model("llama")(IDS, output_hidden_states=True).hidden_states)


def test_a_pass_that_changes_them_says_so() -> None:
    program = reroll.run_passes(captured("gpt2"), "fold_norms")
    assert any("hidden states" in remark for remark in program.origin.steps[-1].remarks)
    with pytest.raises(UsageError, match="not known which values"):
        program.to_module()(IDS, output_hidden_states=True)


def test_what_is_not_known_is_refused() -> None:
    program = captured("llama").edit()
    drop_marks(program)
    with pytest.raises(UsageError, match="not known which values"):
        program.to_module()(IDS, output_hidden_states=True)


def test_a_configuration_that_asks_for_them_is_kept(tmp_path) -> None:
    model = llama(num_hidden_layers=2).eval()
    model.config.output_hidden_states = True
    program = reroll.capture(model)
    program.save(str(tmp_path / "out"))
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.randint(3, 64, (2, 9))
    for lowered in (program.to_module(), opened):
        for a, b in zip(lowered(ids).hidden_states, model(ids).hidden_states, strict=True):
            torch.testing.assert_close(a, b)
