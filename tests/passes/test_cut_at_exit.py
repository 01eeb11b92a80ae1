"""Exits with an adapter, and the lower layers as a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import reroll
from reroll.errors import PassError, UsageError
from reroll.rewrite.analysis.layers import attention_layers
from reroll.rewrite.ir.interpret import run
from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.verify import verify
from reroll.rewrite.pipeline.base import Pass
from reroll.rewrite.pipeline.manager import run_passes
from tests import captured
from tests.conformance.pass_suite import PassSuite

IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))
NAMES = ["llama", "gemma3", "lfm2", "gpt2", "gpt_neox", "bloom", "smollm3", "qwen2"]


def exiting(name: str, at: int = 1, then: str = "") -> Program:
    return run_passes(
        captured.captured(name), f"insert_exits(at=[{at}], adapter=attention){then}", measure=False
    )


class TestCut(PassSuite):
    pipeline = "insert_exits(at=[2], adapter=attention), cut_at_exit"

    def test_it_runs_and_keeps_its_contract(self, before: Program, under_test: Pass) -> None:
        after = self.apply(before, under_test)
        found, whole = (run(p, {"input_ids": IDS}) for p in (after, before))
        assert list(found) == ["logits"]
        assert found["logits"].shape == whole["logits"].shape
        assert not torch.equal(found["logits"], whole["logits"])


class TestInserted(PassSuite):
    pipeline = "insert_exits(at=[2], adapter=attention)"

    def test_it_runs_and_keeps_its_contract(self, before: Program, under_test: Pass) -> None:
        found, whole = (
            run(p, {"input_ids": IDS}) for p in (self.apply(before, under_test), before)
        )
        assert torch.equal(found["logits"], whole["logits"])
        assert found["exit_hidden"].shape == (*IDS.shape, 32)


@pytest.mark.parametrize("name", NAMES)
def test_the_model_stays_and_the_exit_is_a_model(name: str) -> None:
    program = exiting(name)
    verify(program)
    module, original = program.to_module(), captured.captured(name).to_module()
    with torch.no_grad():
        out = module(IDS)
        assert torch.equal(out.logits, original(IDS).logits)
        cut = reroll.twin(module, "cut_at_exit")
        found = cut(IDS).logits
        assert torch.equal(found, module.get_output_embeddings()(out.exit_hidden))
        # with a cache, of which the adapter has a layer
        cache = DynamicCache(config=cut.config)
        steps = [cut(part, past_key_values=cache).logits for part in IDS.split(5, 1)]
    torch.testing.assert_close(torch.cat(steps, 1), found, rtol=1e-4, atol=1e-5)
    assert len(module._assembly.layers) == len(original._assembly.layers) + 1
    # no weight is a second time in memory
    own = {p.data_ptr() for p in module.parameters()}
    assert all(p.data_ptr() in own for p in cut.parameters())


def test_the_adapter_is_an_attention_between_norms() -> None:
    llama = captured.model("llama")
    layer = llama.model.layers[2]
    with torch.no_grad():
        h = llama.model(IDS, output_hidden_states=True).hidden_states[2]
        rope = llama.model.rotary_emb(h, torch.arange(12)[None])
        mask = torch.full((12, 12), torch.finfo(torch.float32).min).triu(1)[None, None]
        added, _ = layer.self_attn(
            hidden_states=layer.input_layernorm(h), position_embeddings=rope, attention_mask=mask
        )
        expected = llama.model.norm(h + added)
        found = exiting("llama", at=2).to_module()(IDS).exit_hidden
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_hidden_states_are_those_of_the_original() -> None:
    with torch.no_grad():
        found, expected = (
            m(IDS, output_hidden_states=True).hidden_states
            for m in (exiting("llama").to_module(), captured.captured("llama").to_module())
        )
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))


def test_the_adapter_has_weights_of_its_own() -> None:
    module = exiting("llama").to_module()
    names = [n for n, _ in module.named_parameters() if n.startswith("exit_adapter")]
    assert len(names) == 6
    with torch.no_grad():
        before = module(IDS)
        for name in names:
            module.get_parameter(name).mul_(1.5)
        after = module(IDS)
    assert torch.equal(before.logits, after.logits)
    assert not torch.allclose(before.exit_hidden, after.exit_hidden)


@pytest.mark.parametrize(
    "then", ["window(size=4, sinks=1, layers=[1])", "linearize(mixer=gla, window=0, layers=[1])"]
)
def test_its_state_can_have_constant_size(then: str) -> None:
    """The adapter is the layer behind those below the exit."""
    before, program = exiting("llama"), exiting("llama", then=f", {then}")
    module = program.to_module()
    with torch.no_grad():
        old, new = before.to_module()(IDS), module(IDS)
    assert torch.equal(old.logits, new.logits)
    assert not torch.allclose(old.exit_hidden, new.exit_hidden)
    kinds = [layer.layer_type for layer in module._assembly.layers]
    assert [n for n, kind in enumerate(kinds) if kind != "full_attention"] == [1]


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    program = exiting("llama")
    program.save(str(tmp_path / "exiting"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "exiting")
    with torch.no_grad():
        expected, found = (m(IDS) for m in (program.to_module(), loaded))
    assert torch.equal(found.exit_hidden, expected.exit_hidden)
    cut = reroll.twin(loaded, "cut_at_exit")
    cut.save_pretrained(tmp_path / "cut")
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")(IDS)
        assert torch.equal(again.logits, cut(IDS).logits)


def test_layers_are_counted_with_the_adapter() -> None:
    layers = attention_layers(exiting("llama", at=2))
    assert [layer.numbers for layer in layers] == [(0, 1), (2,), (3, 4)]


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ("at=[1, 2], adapter=attention", UsageError, "an adapter is for one exit"),
        ("at=[1], adapter=attention, threshold=0.5", UsageError, "no token leaves"),
        ("at=[1], adapter=attention, head=own", UsageError, "no token leaves"),
        ("at=[4], adapter=attention", PassError, "nobody leaves after 4"),
    ],
)
def test_bad_options_are_refused(options: str, error: Any, said: str) -> None:
    with pytest.raises(error, match=said):
        run_passes(captured.captured("llama"), f"insert_exits({options})", measure=False)


def test_models_that_do_not_fit_are_refused() -> None:
    with pytest.raises(PassError, match="no exit with an adapter"):
        run_passes(captured.captured("llama"), "cut_at_exit", measure=False)
    with pytest.raises(PassError, match="has an exit with an adapter already"):
        exiting("llama", then=", insert_exits(at=[1], adapter=attention)")
    with pytest.raises(PassError, match="no linear layer computes the logits"):
        exiting("bert")
