"""Trees of proposals give the model's own tokens in fewer steps than chains."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import reroll
from reroll.errors import UsageError
from reroll.runtime.speculation.drafts import Keeping, Lookup, Wish
from reroll.runtime.speculation.sampling import Sampling
from reroll.runtime.speculation.trees import chosen, merged, other_choices
from tests import captured

IDS = torch.randint(3, 64, (1, 20), generator=torch.Generator().manual_seed(0))
NEW = 24
DELTA = "linearize(mixer=gated_deltanet, window=4, sinks=1)"


@cache
def model(name: str = "llama", passes: str = "") -> Any:
    program = captured.captured(name)
    if passes:
        program = reroll.run_passes(program, passes, measure="off")
    return program.to_module()


def generated(module: Any, draft: Any, branches: int, **options: Any) -> torch.Tensor:
    wishes = {"max_new_tokens": NEW, "draft_tokens": 4, "ends": ()} | options
    return reroll.generate(module, IDS, draft, branches=branches, **wishes)


@pytest.mark.parametrize("branches", [2, 3])
@pytest.mark.parametrize("draft", ["window(size=3, sinks=1)", "tie(blocks=2)", "lookup"])
@pytest.mark.parametrize(
    ("name", "passes"),
    [("llama", ""), ("lfm2", ""), ("llama", DELTA), ("llama", "window(size=8, sinks=2)")],
)
def test_tokens_are_the_model_s_own(name: str, passes: str, draft: str, branches: int) -> None:
    module = model(name, passes)
    wishes = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    alone = module.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=NEW, **wishes)
    assert torch.equal(generated(module, draft, branches), alone)
    assert torch.equal(generated(module, draft, branches, draft_tokens=None), alone)
    end = int(alone[0, -5])
    cut = generated(module, draft, branches, ends=(end,))
    assert torch.equal(cut, alone[:, : cut.shape[1]])
    assert int(cut[0, -1]) == end


def test_second_choices_save_steps() -> None:
    draft = reroll.twin(model(), "window(size=3, sinks=1)")
    steps = {}
    for branches in (1, 3):
        generated(model(), draft, branches)
        steps[branches] = model().speculation_report.steps
    assert steps[3] < steps[1]


def test_a_cache_goes_on_behind_a_tree() -> None:
    module = model("llama", DELTA)
    cache = DynamicCache(config=module.config)
    first = generated(module, "tie(blocks=2)", 2, cache=cache, max_new_tokens=10)
    assert cache.get_seq_length() == first.shape[1] - 1
    whole = reroll.generate(module, IDS, "lookup", max_new_tokens=NEW, ends=())
    rest = reroll.generate(
        module, first, "lookup", max_new_tokens=NEW - 10, ends=(), cache=cache, branches=2
    )
    assert torch.equal(rest, whole)


def test_what_is_drawn_has_the_model_s_distribution() -> None:
    module, sampling = model(), Sampling(temperature=1.0, top_k=4)
    with torch.no_grad():
        logits = module(IDS).logits[0, -1:]
        expected = sampling.distribution(logits)[0]
        best = expected.topk(3).indices
        # two of the likely tokens, and one that cannot be
        chains = [best[:1], torch.cat([best[1:2], best[:1]]), expected.argmin()[None]]
        counts = torch.zeros_like(expected)
        cache = DynamicCache(config=module.config)
        module(IDS[:, :-1], past_key_values=cache)
        tokens, tree = merged(IDS[0, -1:], chains)
        read = module(tokens[None], past_key_values=cache, parents=tree).logits[0]
        torch.manual_seed(0)
        draws = 600
        for _ in range(draws):
            new, path = chosen(read, tokens, tree, sampling)
            counts[new[0]] += 1
            assert tokens[path[1:]].tolist() == new[:-1].tolist()
    spread = (expected * (1 - expected) / draws).sqrt()
    assert ((counts / draws - expected).abs() <= 4 * spread).all()


def test_lookup_proposes_several_matches() -> None:
    tokens = torch.tensor([[5, 6, 7, 8, 5, 6, 9, 3, 5, 6, 7, 4, 5, 6]])
    draft = Lookup()
    assert draft.propose(tokens, Wish(2)).tokens.tolist() == [[7, 4]]
    assert not draft.propose(tokens, Wish(2)).others
    proposal = draft.propose(tokens, Wish(2, branches=3))
    found = [proposal.tokens[0].tolist(), *(x.tolist() for x in proposal.others)]
    assert found == [[7, 4], [9, 3], [7, 8]]


def test_common_beginnings_are_shared() -> None:
    chains = [torch.tensor(x) for x in ([7, 4, 1], [9, 3], [7, 8], [7, 4])]
    tokens, tree = merged(torch.tensor([6]), chains)
    assert tokens.tolist() == [6, 7, 4, 1, 9, 3, 8]
    assert tree.parents.tolist() == [-1, 0, 1, 2, 0, 4, 1]
    choices = [torch.tensor([7, 9]), torch.tensor([5, 4])]
    others = other_choices(torch.tensor([7, 4, 1]), choices)
    assert [x.tolist() for x in others] == [[9], [7, 5]]


def test_a_draft_with_a_state_of_its_own_has_branches() -> None:
    draft = Keeping("own", model("llama", DELTA))
    with torch.no_grad():
        assert len(draft.propose(IDS, Wish(4, branches=2)).others) == 3


def test_a_model_that_would_mix_branches_is_refused() -> None:
    with pytest.raises(UsageError, match="leave branches at 1") as caught:
        generated(model("bloom"), "lookup", 2)
    with pytest.raises(UsageError, match="one row of tokens, and there are 2"):
        reroll.generate(model(), IDS.repeat(2, 1), "lookup", branches=2)
    assert "mix" in str(caught.value)
