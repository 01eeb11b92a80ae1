"""Models that were captured without a cache: each new token has all others read again."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, LlamaForCausalLM

import reroll
from reroll.errors import CaptureError, ExportError, UsageError
from reroll.export.onnx import Onnx
from reroll.export.triton.module import module_text
from reroll.rewrite.capture.export import capture
from reroll.rewrite.ir.text.parser import parse
from reroll.rewrite.ir.text.printer import to_text
from tests import tiny
from tests.captured import model

IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
WISHES = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def refused(*_: Any) -> Any:
    raise CaptureError("no such cache")


@pytest.fixture(scope="module")
def program() -> reroll.Program:
    """A Llama whose cache the capture does not understand."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("reroll.rewrite.capture.export.make_cache", refused)
        return capture(model("llama"))


@pytest.fixture(scope="module")
def lowered(program: reroll.Program) -> Any:
    return program.to_module()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": True},
        {"cache_implementation": "static"},
        {"num_beams": 3},
        {"generation_config": GenerationConfig(use_cache=True, cache_implementation="dynamic")},
    ],
    ids=["default", "cache", "static cache", "beams", "configuration"],
)
def test_generation_reads_everything_again(lowered: Any, options: dict[str, Any]) -> None:
    beams = {k: v for k, v in options.items() if k == "num_beams"}
    expected = model("llama").generate(IDS, **WISHES, **beams)
    assert torch.equal(lowered.generate(IDS, **WISHES, **options), expected)


def test_hidden_padding_changes_nothing(lowered: Any) -> None:
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    expected = model("llama").generate(IDS, attention_mask=mask, **WISHES)
    assert torch.equal(lowered.generate(IDS, attention_mask=mask, **WISHES), expected)


def test_what_needs_a_cache_is_refused(lowered: Any) -> None:
    past = DynamicCache()
    with pytest.raises(UsageError, match="keeps no cache, so it cannot use past_key_values"):
        lowered.generate(IDS, past_key_values=past, **WISHES)
    with pytest.raises(UsageError, match="cannot check what a draft model proposes"):
        lowered.generate(IDS[:1], assistant_model=model("llama"), **WISHES)
    with pytest.raises(UsageError, match="cannot draft"):
        model("llama").generate(IDS[:1], assistant_model=lowered, **WISHES)
    with pytest.raises(UsageError, match="embeddings"):
        lowered.generate(inputs_embeds=lowered.get_input_embeddings()(IDS), **WISHES)
    for options in ({"past_key_values": past}, {"use_cache": True}):
        with pytest.raises(UsageError, match="captured without a cache"):
            lowered(IDS, **options)


def test_recurrences_of_a_pass_are_not_all_of_its_state(
    program: reroll.Program, tmp_path: Any
) -> None:
    """The attentions that are kept still need all tokens."""
    program = reroll.run_passes(program, "linearize(mixer=gla, keep=2)", measure=False)
    made = program.to_module()
    assert not made.keeps_cache
    expected = IDS
    with torch.no_grad():
        for _ in range(4):
            last = made(expected).logits[:, -1:].argmax(-1)
            expected = torch.cat([expected, last], 1)
    assert torch.equal(made.generate(IDS, **{**WISHES, "max_new_tokens": 4}), expected)
    with pytest.raises(ExportError, match="captured without a cache"):
        Onnx().write(program, tmp_path)


class Forgetful(LlamaForCausalLM):
    """Sees no padding once it has a past."""

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        if past_key_values is not None and past_key_values.get_seq_length() > 0:
            attention_mask = torch.ones_like(attention_mask)
        return super().forward(input_ids, attention_mask, position_ids, past_key_values, **kwargs)


def test_what_is_another_computation_with_a_past_generates_without_one_only() -> None:
    original = Forgetful(model("llama").config).eval()
    lowered = capture(original).to_module()
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    with pytest.raises(UsageError, match="does not generate as the original does") as refused:
        lowered.generate(IDS, attention_mask=mask, **WISHES)
    assert "use_cache=False" in str(refused.value.hint)
    wishes = {**WISHES, "attention_mask": mask, "use_cache": False}
    assert torch.equal(lowered.generate(IDS, **wishes), original.generate(IDS, **wishes))


def test_where_the_original_s_cache_forgets_what_its_attention_sees_it_is_refused() -> None:
    config = copy.deepcopy(model("llama").config)
    config.sliding_window = 12
    original = LlamaForCausalLM(config).eval()
    program = capture(original)
    assert program.origin.cache_span == 12
    lowered = program.to_module()
    # nine tokens, and three new ones that are read
    wishes = {**WISHES, "max_new_tokens": 4}
    assert torch.equal(lowered.generate(IDS, **wishes), original.generate(IDS, **wishes))
    with pytest.raises(UsageError, match="cache keeps 12 tokens, and 13 are asked for"):
        lowered.generate(IDS, **{**WISHES, "max_new_tokens": 5})
    wishes = {**WISHES, "max_new_tokens": 9, "use_cache": False}
    assert torch.equal(lowered.generate(IDS, **wishes), original.generate(IDS, **wishes))


def test_a_bundle_of_kernels_needs_a_cache(program: reroll.Program) -> None:
    with pytest.raises(ExportError, match="captured without a cache"):
        module_text(program, ())


def test_a_graph_without_a_cache_says_so(program: reroll.Program, tmp_path: Any) -> None:
    (remark,) = program.origin.remarks
    assert remark.endswith("no such cache")
    found = Onnx(check=True, graphs=("unrolled",)).write(program, tmp_path)
    assert found["states"] == []
    assert found["remarks"] == [remark]
    assert found["graphs"]["unrolled"]["check"]["decode_steps"] is None
    assert remark in (tmp_path / "README.md").read_text()


def test_generation_that_adds_tokens_of_its_own_is_refused() -> None:
    original = tiny.xlm()
    program = capture(original)
    assert parse(to_text(program)).origin.adds_tokens
    lowered = program.to_module()
    assert torch.allclose(lowered(IDS).logits, original(IDS).logits, atol=1e-6)
    with pytest.raises(UsageError, match="tokens beside those that it is given"):
        lowered.generate(IDS, **WISHES)
