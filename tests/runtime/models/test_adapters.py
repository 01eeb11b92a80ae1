"""Adapters of peft: one per depth, also where depths share a weight, and merged into each."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import reroll
from reroll.errors import UsageError
from reroll.rewrite.analysis import tolerances
from reroll.rewrite.ir.program import Program
from reroll.rewrite.pipeline.manager import run_passes
from reroll.runtime import untie
from tests import captured, tiny

IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))


@cache
def program(passes: str, name: str) -> Program:
    found = captured.captured(name)
    if not passes:
        return found
    return run_passes(found, passes, measure=False, tokenizer=tiny.tokenizer())


def lowered(passes: str, name: str = "llama") -> Any:
    return program(passes, name).to_module().eval()


def output(model: Any) -> Tensor:
    """What the model returns for each token, and for a text if it has a pooler."""
    inputs = {"input_ids": IDS}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = IDS.flip(1)
    found = model(**inputs)
    pooled = getattr(found, "pooler_output", None)
    return found[0] if pooled is None else torch.cat([found[0], pooled[:, None]], 1)


def disturbed(model: Any) -> Any:
    """The model with its adapters moved away from what they begin with."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def adapted(model: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))


def trained(model: Any, steps: int = 3) -> Any:
    wanted = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(wanted, lr=1.0)
    for _ in range(steps):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    return model.eval()


PASSES = ["", "tie(blocks=2)", "tie(blocks=2), relax(rank=4)"]


def test_every_trip_of_a_tied_loop_gets_an_adapter_of_its_own() -> None:
    model = lowered("tie(blocks=2)")
    before = model(IDS).logits
    layers = [model.get_submodule(f"model.layers.{t}.self_attn.q_proj") for t in (0, 2)]
    assert layers[0] is not layers[1]
    assert layers[0].weight is layers[1].weight
    peft_model = adapted(model)
    assert torch.equal(peft_model(IDS).logits, before)
    trainable = [n for n, p in peft_model.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * 2 * 4
    peft_model(IDS, labels=IDS).loss.backward()
    grads = [p.grad for n, p in peft_model.named_parameters() if "q_proj" in n and "lora_B" in n]
    assert len({tuple(g.flatten().tolist()) for g in grads}) == 4


@pytest.mark.parametrize("passes", PASSES)
def test_adapters_are_saved_and_loaded(tmp_path: Path, passes: str) -> None:
    model = trained(adapted(lowered(passes)))
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(lowered(passes), str(tmp_path)).eval()
    assert torch.equal(again(IDS).logits, model(IDS).logits)


RELAXED, DELTA = PASSES[-1], "linearize(mixer=gated_deltanet, window=4, sinks=1)"
KINDS = [
    ("llama", ""), ("llama", RELAXED), ("llama", "window(size=4, sinks=1)"), ("llama", DELTA),
    ("llama", "insert_exits(at=[2], threshold=0.5)"), ("gemma3", ""), ("gpt2", "tie(blocks=2)"),
    ("t5", "tie(blocks=2)"), ("bart", ""), ("bert", RELAXED),
]  # fmt: skip
CONFIGS: dict[str, Any] = {
    "lora": lambda: LoraConfig(r=4),
    "dora": lambda: LoraConfig(r=4, use_dora=True),
    "ia3": peft.IA3Config,
    "all linear": lambda: LoraConfig(r=2, target_modules="all-linear"),
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(("name", "passes"), KINDS)
def test_each_depth_has_an_adapter_that_learns_and_merges(
    name: str, passes: str, kind: str
) -> None:
    """Targets are the defaults of the original's type, which peft knows by its name."""
    model = lowered(passes, name)
    with torch.no_grad():
        before = output(model)
    adapted = get_peft_model(model, CONFIGS[kind]())
    with torch.no_grad():
        assert torch.equal(output(adapted), before)
    disturbed(adapted)
    base = {n: p.detach().clone() for n, p in adapted.named_parameters() if not p.requires_grad}
    learning = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    output(adapted.train()).square().mean().backward()
    # the decays of a mixer begin with factors of zero, below which nothing learns at first
    still = {n for n, p in learning.items() if p.grad is None or not p.grad.any()}
    assert not {n for n in still if ".mixer." not in n}
    torch.optim.SGD(list(learning.values()), lr=0.01).step()
    assert all(torch.equal(p, base[n]) for n, p in adapted.named_parameters() if n in base)
    with torch.no_grad():
        expected = output(adapted.eval())
        assert not torch.allclose(expected, before)
        torch.testing.assert_close(output(adapted.merge_and_unload()), expected, **CLOSE)


# logits of T5 are two orders larger than those of the others
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.mark.parametrize(
    ("name", "kind"),
    [(n, k) for n in ("llama", "gpt2", "t5") for k in ("lora", "ia3")]
    + [(n, "lora") for n in ("gemma3", "bart", "bert", "opt", "bloom")],
)
def test_an_adapter_of_the_original_is_one_of_the_lowered_model(
    tmp_path: Path, name: str, kind: str
) -> None:
    original, model = copy.deepcopy(captured.model(name)).eval(), lowered("", name)
    adapted = disturbed(get_peft_model(original, CONFIGS[kind]()))
    adapted.save_pretrained(str(tmp_path))
    found = PeftModel.from_pretrained(model, str(tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(output(found), output(adapted), **CLOSE)
    own = get_peft_model(lowered("", name), CONFIGS[kind]())
    (chosen,), (theirs,) = own.peft_config.values(), adapted.peft_config.values()
    assert chosen.target_modules == theirs.target_modules


WHOLE = {
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "norm"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 7]},
}


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_embeddings_and_norms_of_the_original_are_trained_here(
    tmp_path: Path, name: str, kind: str
) -> None:
    """Gemma scales its embeddings, in the original within the module that peft replaces."""
    original, model = copy.deepcopy(captured.model(name)).eval(), lowered("", name)
    adapted = disturbed(get_peft_model(original, LoraConfig(r=4, **WHOLE[kind])))
    adapted.save_pretrained(str(tmp_path))
    found = PeftModel.from_pretrained(model, str(tmp_path)).eval()
    with torch.no_grad():
        expected = output(adapted)
        torch.testing.assert_close(output(found), expected, **CLOSE)
        torch.testing.assert_close(output(found.merge_and_unload()), expected, **CLOSE)
        torch.testing.assert_close(output(model.to_program().to_module()), expected, **CLOSE)


@pytest.mark.parametrize("passes", PASSES)
def test_a_merge_unties_what_has_an_adapter(tmp_path: Path, passes: str) -> None:
    base = lowered(passes)
    model = trained(adapted(base))
    expected = model(IDS).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, expected)
    merged.save_pretrained(str(tmp_path))
    again = AutoModelForCausalLM.from_pretrained(str(tmp_path))
    assert torch.equal(again(IDS).logits, merged(IDS).logits)
    # only what had an adapter is stored once per depth now
    weights = again.program.weights
    assert len(set(weights["model.layers.*.mlp.up_proj.weight"].index)) == 4
    kept = (0, 1, 2, 3) if not passes else (0, 0, 1, 1)
    assert weights["model.layers.*.mlp.down_proj.weight"].index in (kept, (0, 1, 0, 1))


def test_adapters_of_some_depths_untie_no_others() -> None:
    model = lowered("tie(blocks=1)")
    config = LoraConfig(r=4, target_modules=["up_proj"], layers_to_transform=[2])
    model = disturbed(get_peft_model(model, config))
    expected = model(IDS).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, expected)
    index = merged.to_program().weights["model.layers.*.mlp.up_proj.weight"].index
    assert index == (0, 0, 1, 0)


def test_a_merge_that_is_undone() -> None:
    model = trained(adapted(lowered("tie(blocks=2)")))
    expected = model(IDS).logits
    model.merge_adapter()
    torch.testing.assert_close(model(IDS).logits, expected)
    model.unmerge_adapter()
    torch.testing.assert_close(model(IDS).logits, expected)


def test_adapters_of_two_kinds_are_merged() -> None:
    model = lowered("tie(blocks=2)")
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"])
    mixed = peft.get_peft_model(model, config, mixed=True)
    mixed.add_adapter("other", peft.LoHaConfig(r=4, target_modules=["q_proj"]))
    mixed.set_adapter(["default", "other"])
    disturbed(mixed)
    expected = mixed(IDS).logits
    torch.testing.assert_close(mixed.merge_and_unload()(IDS).logits, expected)


def test_untying_is_exact() -> None:
    model = trained(adapted(lowered("tie(blocks=2)")))
    expected = model(IDS).logits
    untie(model.get_base_model())
    assert torch.equal(model(IDS).logits, expected)


IN_ANOTHER_PROCESS = """
import sys, torch, reroll
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[2])
"""


def test_an_adapter_opens_with_its_model_in_another_process(tmp_path: Path) -> None:
    lowered(RELAXED).save_pretrained(str(tmp_path / "base"))
    base = AutoModelForCausalLM.from_pretrained(str(tmp_path / "base"))
    model = disturbed(get_peft_model(base, LoraConfig(r=4, task_type="CAUSAL_LM")))
    model.save_pretrained(str(tmp_path / "adapter"))
    torch.save(IDS, tmp_path / "data")
    command = [sys.executable, "-c", IN_ANOTHER_PROCESS]
    subprocess.run([*command, str(tmp_path / "adapter"), str(tmp_path / "data")], check=True)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "data"), model(IDS).logits)


REFUSED: list[tuple[str, Any, str]] = [
    ("", lambda: peft.LNTuningConfig(target_modules=["norm"]), r"model\.norm, .*is not called"),
    (DELTA, lambda: LoraConfig(use_dora=True, target_modules="all-linear"), "a row is zero"),
    (
        "insert_exits(at=[2], head=own)",
        lambda: LoraConfig(target_modules=["q_proj", "embed_tokens"]),
        r"model\.embed_tokens.*where an adapter has no effect",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("passes", "config", "said"), REFUSED)
def test_an_adapter_that_would_not_work_is_refused(passes: str, config: Any, said: str) -> None:
    model = lowered(passes)
    expected = output(model)
    with pytest.raises(UsageError, match=said):
        get_peft_model(model, config())
    assert torch.equal(output(model), expected)
    assert not [n for n, _ in model.named_parameters() if "lora" in n or "ln_tuning" in n]


def test_a_scheduler_has_no_adapters() -> None:
    """It reads weights and calls no layer, so an adapter would be ignored."""
    model = lowered("tie(blocks=2)")
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    for each in (model, model.get_base_model()):
        with pytest.raises(UsageError, match="an adapter is no part"):
            reroll.DepthScheduler(each, slots=1, length=32)
    assert reroll.DepthScheduler(model.merge_and_unload(), slots=1, length=32)


PROMPTS = {
    "prompt": peft.PromptTuningConfig, "encoder": peft.PromptEncoderConfig,
    "prefix": peft.PrefixTuningConfig,
}  # fmt: skip


@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("passes", ["", RELAXED])
def test_virtual_tokens(kind: str, passes: str) -> None:
    def with_tokens(model: Any) -> Any:
        torch.manual_seed(0)
        config = PROMPTS[kind](task_type="CAUSAL_LM", num_virtual_tokens=3)
        return get_peft_model(model, config).eval()

    model = with_tokens(lowered(passes))
    if not passes:
        original = with_tokens(copy.deepcopy(captured.model("llama")).eval())
        torch.testing.assert_close(model(IDS).logits, original(IDS).logits)
    model(IDS, labels=IDS).loss.backward()
    learning = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad.any() for p in learning)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    tokens = model.generate(input_ids=IDS, **options)[:, IDS.shape[1] :]
    if kind == "prefix":
        return
    prompt = model.get_prompt(batch_size=2)
    rows = torch.cat([prompt, model.get_input_embeddings()(IDS)], 1)
    base = model.get_base_model()
    assert torch.equal(base.generate(inputs_embeds=rows, **options), tokens)


@pytest.mark.parametrize("passes", ["window(size=4, sinks=1)", DELTA])
def test_a_prefix_needs_a_cache_of_all_tokens(passes: str) -> None:
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(lowered(passes), config)
    with pytest.raises(UsageError, match=r"layer 0 of the cache .* another format"):
        model(IDS)


def test_generation_with_adapters() -> None:
    model = trained(adapted(lowered("tie(blocks=2)")))
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(
        model.generate(input_ids=IDS, **options),
        model.generate(input_ids=IDS, use_cache=False, **options),
    )


def test_checkpointing_with_adapters_gives_the_same_gradients() -> None:
    grads = []
    for checkpointing in (False, True):
        model = adapted(lowered("")).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(IDS, labels=IDS).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "gemma-3-270m"])
def test_a_real_model_learns_and_is_resized_as_its_original(
    real_model: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    path = str(real_model(name))
    reroll.capture(path).save(str(tmp_path / "base"))
    base, original = (
        AutoModelForCausalLM.from_pretrained(p) for p in (str(tmp_path / "base"), path)
    )
    tokenizer = AutoTokenizer.from_pretrained(path)
    inputs = tokenizer("The capital of France is Paris.", return_tensors="pt")
    with torch.no_grad():
        before = base(**inputs).logits
    model = get_peft_model(base, LoraConfig(r=8))
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
    assert all(p.grad.any() for p in learning)
    model.eval().save_pretrained(str(tmp_path / "adapter"))
    bound = tolerances.forward(base.dtype)
    with torch.no_grad():
        expected = model(**inputs).logits
        theirs = PeftModel.from_pretrained(original, str(tmp_path / "adapter")).eval()
        assert tolerances.relative_rms(theirs(**inputs).logits, expected) <= bound
        merged = model.merge_and_unload()
        assert tolerances.relative_rms(merged(**inputs).logits, expected) <= bound
        original = theirs.merge_and_unload()
        for each in (merged, original):
            torch.manual_seed(0)
            each.resize_token_embeddings(len(tokenizer) + 3, pad_to_multiple_of=8)
        inputs["input_ids"][0, -1] = len(tokenizer) + 2
        resized = merged(**inputs).logits
        assert tolerances.relative_rms(original(**inputs).logits, resized) <= bound
        merged.save_pretrained(str(tmp_path / "resized"))
        again = AutoModelForCausalLM.from_pretrained(str(tmp_path / "resized"))
        assert torch.equal(again(**inputs).logits, resized)
