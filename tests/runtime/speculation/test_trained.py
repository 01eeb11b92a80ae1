"""Drafts that are trained, an exit with an adapter and prompt tokens: tokens stay the model's."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import reroll
from reroll.errors import PassError, UsageError
from reroll.recover import Batch, Models
from reroll.recover.stages.exit_adapter import ExitAdapter
from reroll.runtime.speculation.drafts import Wish
from reroll.runtime.speculation.prompts import Prompting
from reroll.runtime.speculation.reading import begin
from tests import captured

IDS = torch.randint(3, 64, (1, 12), generator=torch.Generator().manual_seed(0))
NEW = 24
EXIT, PROMPTS = "insert_exits(at=[1], adapter=attention)", "prompt_tokens(count=3)"
DELTA = "linearize(mixer=gated_deltanet, window=4)"


@cache
def model(name: str, passes: str = f"{EXIT}, {PROMPTS}") -> Any:
    tokens = lambda text: [3 + ord(c) % 60 for c in text]  # noqa: E731
    program = captured.captured(name)
    return reroll.run_passes(program, passes, measure="off", tokenizer=tokens).to_module()


def greedy(module: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    out: torch.Tensor = module.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return out


def generated(module: Any, draft: Any, count: int | None = 3, **options: Any) -> torch.Tensor:
    return reroll.generate(
        module, IDS, draft, max_new_tokens=NEW, draft_tokens=count, ends=(), **options
    )


@pytest.mark.parametrize("name", ["llama", "gemma3", "lfm2", "gpt2"])
@pytest.mark.parametrize("draft", ["exit", "prompts"])
def test_tokens_are_the_model_s_own(name: str, draft: str) -> None:
    module = model(name)
    for count in (1, 3, None):
        assert torch.equal(generated(module, draft, count), greedy(module))
    # the draft was used, and the model itself is that without a draft
    assert torch.equal(greedy(module), greedy(captured.captured(name).to_module()))
    generated(module, draft)
    ((proposed, _),) = module.speculation_report.drafts.values()
    assert proposed > 0


@pytest.mark.parametrize("draft", ["exit", "prompts"])
def test_a_recurrent_state_goes_back(draft: str) -> None:
    module = model("llama", f"{DELTA}, {EXIT}, {PROMPTS}")
    assert torch.equal(generated(module, draft), greedy(module))


def test_a_list_has_them_by_name() -> None:
    module = model("llama")
    assert torch.equal(generated(module, ["exit", "prompts", "lookup"], None), greedy(module))
    assert list(module.speculation_report.drafts) == ["exit", "prompts", "lookup"]


def test_batches() -> None:
    module = model("llama")
    rows = torch.cat([IDS, IDS.flip(1)])
    for draft in ("exit", "prompts"):
        found = reroll.generate(module, rows, draft, max_new_tokens=NEW, draft_tokens=3, ends=())
        assert torch.equal(found, torch.cat([greedy(module, row[None]) for row in rows]))


def test_prompt_tokens_leave_nothing_in_the_cache() -> None:
    module, cache_ = model("lfm2"), DynamicCache(config=model("lfm2").config)
    first = generated(module, "prompts", cache=cache_)
    assert cache_.get_seq_length() == first.shape[1] - 1
    more = reroll.generate(
        module, first, "prompts", cache=cache_, max_new_tokens=8, draft_tokens=2, ends=()
    )
    expected = greedy(module, first)[:, : more.shape[1]]
    assert torch.equal(more, expected)


def test_proposals_are_the_predictions_behind_right_tokens() -> None:
    """By hand: the logits at prompt tokens behind the tokens so far."""
    module = model("llama")
    with torch.no_grad():
        reading = begin(module, 1)
        reading.read(IDS[:, :-1])
        reading.record()
        draft = Prompting("prompts", reading)
        assert draft.propose([IDS[0]], Wish(3)).tokens.shape == (1, 0)
        logits = reading.read(IDS[:, -1:])
        reading.take_back([0])
        numbers = torch.tensor([[0] * 12 + [1, 2, 3]])
        behind = torch.cat([IDS, torch.zeros(1, 3, dtype=torch.long)], 1)
        by_hand = module(behind, prompt_tokens=numbers).logits
        assert reading.places == 12
        torch.testing.assert_close(logits[:, -1], by_hand[:, 11], rtol=1e-4, atol=1e-5)
        row = torch.cat([IDS[0], logits[0, -1].argmax()[None]])
        found = draft.propose([row], Wish(3)).tokens
        assert torch.equal(found, by_hand[:, 12:].argmax(-1))
        # behind a wrong token there are none
        reading.read(torch.cat([row[None, -1:], found], 1))
        reading.take_back([3])
        longer = torch.cat([row, row[:1]])
        assert draft.propose([longer], Wish(3)).tokens.shape == (1, 0)


def test_right_predictions_are_accepted() -> None:
    """A model that says one token for ever, and prompt tokens that are that token."""
    module = reroll.run_passes(captured.captured("gpt2"), PROMPTS, measure="off").to_module()
    tokens = greedy(module)
    assert len(set(tokens[0, 13:].tolist())) == 1
    generated(module, "prompts")
    ((proposed, accepted),) = module.speculation_report.drafts.values()
    assert proposed > 0
    assert accepted > 0.8 * proposed
    assert module.speculation_report.steps <= NEW / 3


def test_an_exit_that_is_trained_is_right() -> None:
    """An adapter of random weights, before and after some steps on the tokens that are said."""
    module = reroll.run_passes(captured.captured("llama"), EXIT, measure="off").to_module()
    stage, ids = ExitAdapter.make({}), greedy(module)
    module.requires_grad_(False)
    own = [p for n, p in module.named_parameters() if n.startswith("exit_adapter")]
    for parameter in own:
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(own, 3e-2)
    rates = []
    for steps in (0, 100):
        for _ in range(steps):
            loss = stage.loss(Batch(ids, torch.ones_like(ids)), Models(module, module, None))
            optimizer.zero_grad()
            loss.value.backward()
            optimizer.step()
        assert torch.equal(generated(module, "exit"), ids)
        ((proposed, accepted),) = module.speculation_report.drafts.values()
        rates.append(accepted / proposed)
    assert rates[0] < 0.5
    assert rates[1] > 0.8


@pytest.mark.parametrize("draft", ["exit", "prompts"])
def test_a_saved_model_has_its_draft(draft: str, tmp_path: Path) -> None:
    model("llama").save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(generated(loaded, draft), greedy(model("llama")))
    ((proposed, _),) = loaded.speculation_report.drafts.values()
    assert proposed > 0


@pytest.mark.parametrize("draft", ["exit", "prompts"])
def test_sampling(draft: str) -> None:
    module = model("llama")
    found = generated(module, draft, temperature=2.0, top_k=1)
    assert torch.equal(found, greedy(module))


def test_models_without_them_are_refused() -> None:
    module = captured.captured("llama").to_module()
    with pytest.raises(PassError, match="no exit with an adapter"):
        generated(module, "exit")
    with pytest.raises(UsageError, match="no prompt tokens"):
        generated(module, "prompts")
