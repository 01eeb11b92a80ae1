"""Rotary frequencies that depend on the length of a text."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import transformers

from reroll.rewrite.analysis.tolerances import FORWARD, relative_rms
from reroll.rewrite.capture.export import capture
from reroll.rewrite.capture.raising import raise_idioms
from reroll.rewrite.capture.rolling import roll_loops
from reroll.rewrite.capture.rotary import frequencies_by_position
from reroll.rewrite.ir.interpret import run
from reroll.rewrite.ir.text.parser import parse
from tests.captured import SPECIAL

ORIGINAL = 16
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip
SHORT, LONG = [1.0 + i / 10 for i in range(8)], [2.0 + i / 3 for i in range(8)]
LONGROPE = {
    "rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG, "rope_theta": 1e4,
    "original_max_position_embeddings": ORIGINAL,
}  # fmt: skip
YARN = {"factor": 4.0, "original_max_position_embeddings": ORIGINAL}
KINDS: dict[str, dict[str, Any]] = {
    "longrope": {"rope_parameters": LONGROPE, "max_position_embeddings": 64},
    "dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "factor": 4.0},
        "max_position_embeddings": ORIGINAL,
    },
    "yarn": {"rope_parameters": {"rope_type": "yarn", **YARN}},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0}},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3", **YARN, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        }
    },
    "proportional": {
        "rope_parameters": {"rope_type": "proportional", "partial_rotary_factor": 0.5}
    },
}  # fmt: skip
# of another class: its generation drops its cache where the frequencies change
PHI3 = "phi3"
BY_LENGTH = ["longrope", "dynamic"]


def make(kind: str) -> Any:
    """A Llama, or a Phi-3, which has seen no text yet."""
    if kind == PHI3:
        longrope = {**KINDS["longrope"], "original_max_position_embeddings": ORIGINAL}
        config = transformers.Phi3Config(**{**SIZES, **SPECIAL, **longrope})
        return noisy(transformers.Phi3ForCausalLM(config))
    return noisy(transformers.LlamaForCausalLM(llama_config(kind)))


def llama_config(kind: str) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(**{**SIZES, **SPECIAL, **KINDS[kind]})


def noisy(model: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.set_attn_implementation("eager")
    return model.eval()


@cache
def flat(kind: str) -> Any:
    return capture(make(kind), roll=False)


@cache
def rolled(kind: str) -> Any:
    return roll_loops(raise_idioms(flat(kind)))


@cache
def module(kind: str) -> Any:
    return rolled(kind).to_module()


def tokens(length: int, rows: int = 2) -> torch.Tensor:
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(length))


def positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


def assert_exact(kind: str, mask: torch.Tensor) -> None:
    inputs = {
        "input_ids": tokens(mask.shape[1], mask.shape[0]),
        "attention_mask": mask,
        "position_ids": positions(mask),
    }
    with torch.no_grad():
        expected = make(kind)(**inputs, use_cache=False).logits
    assert torch.equal(run(flat(kind), inputs)["logits"], expected)


@pytest.mark.parametrize("kind", BY_LENGTH)
@pytest.mark.parametrize("length", [3, ORIGINAL - 1, ORIGINAL, ORIGINAL + 1, 40])
def test_frequencies_are_those_of_the_length(kind, length):
    assert_exact(kind, torch.ones(2, length, dtype=torch.long))


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - set(BY_LENGTH)))
def test_frequencies_of_every_kind(kind):
    assert_exact(kind, torch.ones(2, 40, dtype=torch.long))


@pytest.mark.parametrize("kind", BY_LENGTH)
@pytest.mark.parametrize("longest", [ORIGINAL, ORIGINAL + 1])
def test_the_longest_row_of_a_batch_decides(kind, longest):
    mask = torch.ones(3, ORIGINAL + 4, dtype=torch.long)
    for row, length in enumerate([longest, 5, longest - 2]):
        mask[row, : mask.shape[1] - length] = 0
    assert_exact(kind, mask)


@pytest.mark.parametrize("kind", [*BY_LENGTH, PHI3])
@pytest.mark.parametrize("length", [ORIGINAL - 4, ORIGINAL, ORIGINAL + 3])
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 2}])
def test_generation_across_the_original_length(kind, length, options):
    ids, mask = tokens(length), torch.ones(2, length, dtype=torch.long)
    mask[1, :3] = 0
    expected = generated(make(kind), ids, attention_mask=mask, **options)
    actual = generated(module(kind), ids, attention_mask=mask, **options)
    assert torch.equal(actual.sequences, expected.sequences)
    # random models may agree on tokens whatever their frequencies are
    error = relative_rms(torch.stack(actual.logits), torch.stack(expected.logits))
    assert error < FORWARD[torch.float32]


def generated(model: Any, ids: torch.Tensor, **options: Any) -> Any:
    return model.generate(
        ids, max_new_tokens=8, do_sample=False, eos_token_id=None, output_logits=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip


def test_the_length_of_reading_anew_is_saved(tmp_path):
    assert flat(PHI3).origin.rereads_at == ORIGINAL + 1
    assert flat("longrope").origin.rereads_at is None
    rolled(PHI3).save(tmp_path / "saved")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = tokens(ORIGINAL - 4)
    expected = torch.stack(generated(make(PHI3), ids).logits)
    actual = torch.stack(generated(loaded, ids).logits)
    assert relative_rms(actual, expected) < FORWARD[torch.float32]
    # the others go on with the keys of short texts
    program = loaded.to_program()
    program = replace(program, origin=replace(program.origin, rereads_at=None))
    going_on = torch.stack(generated(program.to_module(), ids).logits)
    assert relative_rms(going_on, expected) > 1e-2


@pytest.mark.parametrize("kind", BY_LENGTH)
def test_a_text_has_the_frequencies(kind):
    program = rolled(kind)
    again = parse(str(program), source=program.source)
    inputs = {"input_ids": tokens(ORIGINAL + 1)}
    assert torch.equal(run(again, inputs)["logits"], run(program, inputs)["logits"])


def test_layer_types_have_frequencies_of_their_own():
    def made() -> Any:
        config = transformers.Gemma3TextConfig(
            **SIZES, **SPECIAL, head_dim=16, max_position_embeddings=ORIGINAL, sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
            rope_parameters={
                "sliding_attention": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e3},
                "full_attention": LONGROPE,
            },
        )  # fmt: skip
        return noisy(transformers.Gemma3ForCausalLM(config))

    program = capture(made(), roll=False)
    for length in (ORIGINAL, ORIGINAL + 4):
        ids = tokens(length)
        with torch.no_grad():
            expected = made()(input_ids=ids, use_cache=False).logits
        assert torch.equal(run(program, {"input_ids": ids})["logits"], expected)


@pytest.mark.parametrize("kind", BY_LENGTH)
def test_a_model_that_has_read_a_long_text_is_captured_as_new_and_left_as_it_was(kind):
    model = make(kind)
    with torch.no_grad():
        model(tokens(40))
    embedding = model.model.rotary_emb
    before, frequencies = set(vars(embedding)), embedding.inv_freq.clone()
    program = capture(model, roll=False)
    assert set(vars(embedding)) == before
    assert torch.equal(embedding.inv_freq, frequencies)
    inputs = {"input_ids": tokens(ORIGINAL)}
    assert torch.equal(run(program, inputs)["logits"], run(flat(kind), inputs)["logits"])


def test_a_forward_that_somebody_has_replaced_is_theirs():
    model = make("dynamic")
    embedding = model.model.rotary_emb
    embedding.forward = lambda x, position_ids: (x, position_ids)
    with frequencies_by_position(model):
        assert embedding(1, 2) == (1, 2)
    assert embedding(1, 2) == (1, 2)
