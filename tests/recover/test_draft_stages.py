"""Stages that train drafts: an exit's adapter, and prompt tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import reroll
from reroll.errors import UsageError
from reroll.recover import Batch, Models, load_recipe, recover
from reroll.recover import recipe as recipes
from reroll.recover.stages.exit_adapter import ExitAdapter
from reroll.recover.stages.prompt_tokens import PromptTokens, _behind, _together, read_by_mask
from reroll.recover.trainable import training
from reroll.rewrite.analysis.samples import sample_text
from reroll.rewrite.pipeline.manager import run_passes
from tests import captured, tiny

IDS = torch.randint(3, 64, (3, 24), generator=torch.Generator().manual_seed(0))
BATCH = Batch(IDS, torch.ones_like(IDS))
EXIT, PROMPTS = "insert_exits(at=[1], adapter=attention)", "prompt_tokens(count=3)"


def models(name: str, passes: str) -> Models:
    module = run_passes(captured.captured(name), passes, measure=False).to_module()
    return Models(module, module, None)


@pytest.mark.parametrize("name", ["llama", "gemma3", "lfm2"])
@pytest.mark.parametrize(("passes", "kind"), [(EXIT, ExitAdapter), (PROMPTS, PromptTokens)])
def test_training_lowers_the_loss_and_leaves_the_model(name: str, passes: str, kind: Any) -> None:
    given = models(name, passes)
    stage = kind.make({})
    stage.check_models(given)
    with torch.no_grad():
        before = given.module(IDS).logits
    with training(given.module, stage, frozenset()) as student:
        trained = [n for n, p in student.named_parameters() if p.requires_grad]
        assert trained
        assert all(n.startswith(("exit_adapter.", "prompt_tokens.")) for n in trained)
        optimizer = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], 1e-2)
        losses = []
        for _ in range(15):
            loss = stage.loss(BATCH, given)
            losses.append(loss.value.item())
            optimizer.zero_grad()
            loss.value.backward()
            optimizer.step()
    assert losses[-1] < 0.75 * losses[0]
    with torch.no_grad():
        assert torch.equal(given.module(IDS).logits, before)


def test_the_exit_learns_the_distribution_of_the_model() -> None:
    given = models("llama", EXIT)
    with torch.no_grad():
        out = given.module(IDS)
        p = out.logits.log_softmax(-1)
        q = given.module.get_output_embeddings()(out.exit_hidden).log_softmax(-1)
    expected = (p.exp() * (p - q)).sum(-1).mean()
    torch.testing.assert_close(ExitAdapter.make({}).loss(BATCH, given).value.detach(), expected)


def test_padding_teaches_nothing() -> None:
    given, mask = models("llama", EXIT), torch.ones_like(IDS)
    mask[:, 20:] = 0
    other = IDS.masked_fill(mask == 0, 5)
    losses = [ExitAdapter.make({}).loss(Batch(ids, mask), given).value for ids in (IDS, other)]
    assert torch.equal(*losses)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_places_by_a_mask_are_as_one_by_one(name: str) -> None:
    given, places = models(name, PROMPTS), [2, 9, 12]
    assert read_by_mask(given.module.program)
    together = _together(given, IDS, torch.tensor(places), 3)
    for number, place in enumerate(places):
        alone = _behind(given, IDS, place, 3)
        for both, one in zip(together, alone, strict=True):
            for found, expected in zip(both, one, strict=True):
                torch.testing.assert_close(found[:, number], expected[:, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gemma3", "lfm2", "bloom"])
def test_what_no_mask_says_is_read_place_by_place(name: str) -> None:
    """Windows, convolutions, and positions that a bias counts."""
    assert not read_by_mask(models(name, PROMPTS).module.program)


def test_prompt_tokens_learn_what_comes_later() -> None:
    given = models("llama", PROMPTS)
    ((ahead, expected), *_) = _behind(given, IDS, 9, 3)
    logits = given.module(IDS).logits
    torch.testing.assert_close(expected[:, 0], logits[:, 10], rtol=1e-4, atol=1e-5)
    numbers = torch.tensor([[0] * 10 + [1]]).expand(3, -1)
    one = given.module(IDS[:, :11], prompt_tokens=numbers).logits[:, -1]
    torch.testing.assert_close(ahead[:, 0], one, rtol=1e-4, atol=1e-5)


def test_models_without_them_are_refused() -> None:
    plain = models("llama", "window(size=8)")
    refused = (ExitAdapter, "no exit with an adapter"), (PromptTokens, "no prompt tokens")
    for kind, said in refused:
        with pytest.raises(UsageError, match=said):
            kind.make({}).check_models(plain)
    short = Batch(IDS[:, :4], torch.ones(3, 4, dtype=torch.long))
    with pytest.raises(UsageError, match="no place for 3 prompt tokens"):
        PromptTokens.make({}).loss(short, models("llama", PROMPTS))


@pytest.mark.parametrize("name", ["draft-exit", "prompt-tokens"])
def test_recipes_are_read(name: str) -> None:
    (stage,) = load_recipe(name).stages
    assert stage.name == {"draft-exit": "exit_adapter", "prompt-tokens": "prompt_tokens"}[name]


@pytest.mark.usefixtures("captured_once")
def test_a_run_trains_and_saves_them(tmp_path: Path) -> None:
    path = tiny.save(tiny.llama(), tmp_path / "model", tiny.tokenizer())
    text = tmp_path / "text.txt"
    text.write_text(sample_text(), encoding="utf-8")
    settings = {"length": 32, "batch": 4, "held_rows": 2}
    both = [{"exit_adapter": {"lr": 1e-2}}, {"prompt_tokens": {"lr": 1e-2, "places": 4}}]
    recipe = recipes.parse({"recover": {**settings, "stages": both}})
    student = reroll.run_passes(reroll.capture(str(path)), f"{EXIT}, {PROMPTS}", measure=False)
    recover(student, tmp_path / "out", data=[text], recipe=recipe, tokens=32 * 4 * 12)
    trained, before = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), student.to_module()
    changed = {
        name
        for name, parameter in trained.named_parameters()
        if not torch.equal(parameter, before.get_parameter(name))
    }
    assert changed
    assert all(n.startswith(("exit_adapter.", "prompt_tokens.")) for n in changed)
