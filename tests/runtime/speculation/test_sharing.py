"""A draft with fewer layers reads the states of just these layers."""

from __future__ import annotations

import pytest
import torch

import reroll
from reroll.runtime.speculation.drafts import Borrowing, Wish, draft_of
from reroll.runtime.speculation.reading import begin
from reroll.runtime.speculation.sharing import aligned, shared_states
from tests import captured

IDS = torch.randint(3, 64, (1, 20), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "passes", "draft", "places"),
    [
        ("llama", "", "skip(layers=[1, 2])", [0, 3]),
        ("llama", "", "skip(attention=[0], feed_forward=[1, 2, 3])", [1, 2, 3]),
        ("gemma3", "", "skip(layers=[0])", [1, 2, 3]),
        ("gpt2", "", "skip(layers=[3])", [0, 1, 2]),
        ("lfm2", "", "skip(layers=[0, 2])", [1, 3]),
        ("llama", "tie(blocks=2, layout=cycle)", "skip(layers=[1, 2])", [0, 3]),
        ("llama", "tie(blocks=2, norms=true, layout=cycle)", "skip(layers=[2])", [0, 1, 3]),
        ("llama", "linearize(mixer=gla, window=4)", "skip(layers=[1])", [0, 1, 4, 5, 6, 7]),
    ],
)
def test_states_are_those_of_the_same_weights(name, passes, draft, places) -> None:
    program = captured.captured(name)
    if passes:
        program = reroll.run_passes(program, passes, measure="off")
    module = program.to_module()
    made = reroll.twin(module, draft)
    assert shared_states(module, made) == places


def test_weights_of_another_model_do_not_match() -> None:
    module = captured.captured("llama").to_module()
    other = reroll.run_passes(captured.captured("llama"), "skip(layers=[1])", measure="off")
    assert shared_states(module, other.to_module()) is None


def test_alignment() -> None:
    assert aligned("abab", "ab") == [0, 1]
    assert aligned("abab", "aab") == [0, 2, 3]
    assert aligned("abcd", "bd") == [1, 3]
    assert aligned("abcd", "db") is None
    assert aligned("ab", "abc") is None


@pytest.mark.parametrize("name", ["llama", "gemma3", "lfm2"])
def test_what_it_proposes_is_that_of_a_forward_over_everything(name: str) -> None:
    """The entries that the model has kept are not those that a shorter model would have."""
    module = captured.captured(name).to_module()
    draft = reroll.twin(module, "skip(layers=[1])")
    reading = begin(module, 1)
    cache = reading.cache
    with torch.no_grad():
        reading.read(IDS[:, :-1])
        made = draft_of("", draft, reading)
        assert isinstance(made, Borrowing)
        before = [x.clone() for layer in cache.layers for x in _tensors(layer)]
        found = made.propose(list(IDS), Wish(1)).tokens
        after = [x for layer in cache.layers for x in _tensors(layer)]
    assert all(map(torch.equal, before, after))
    # by hand: both have read the same, and the draft is given what the model has kept of it
    with torch.no_grad():
        short = begin(draft, 1)
        short.read(IDS[:, :-1])
        for place, layer in zip(made.places, short.cache.layers, strict=True):
            for attribute, value in vars(cache.layers[place]).items():
                if attribute in ("keys", "values", "conv_states", "recurrent_states"):
                    setattr(layer, attribute, value)
        expected = short.read(IDS[:, -1:])[:, -1].argmax(-1)
    assert torch.equal(found[0], expected)


def _tensors(layer) -> list[torch.Tensor]:
    return [x for x in vars(layer).values() if isinstance(x, torch.Tensor)]
