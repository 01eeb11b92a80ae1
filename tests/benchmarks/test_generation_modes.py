"""Modes of `generate` are data: what they name exists, and results are told apart."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.__main__ import loaded
from benchmarks.generation_modes import BY, OBJECTS, Side, attempt, result
from reroll.errors import UsageError
from tests import tiny

MODES = loaded("generation_modes")["modes"]


@pytest.fixture(scope="module")
def side() -> Side:
    # `generate` is given 2 as the token that pads
    model = tiny.llama(layers=2, vocab_size=64, pad_token_id=2)
    assistant = tiny.llama(layers=2, vocab_size=64, pad_token_id=2, seed=1)
    return Side(model, {"input_ids": torch.arange(3, 21).view(2, 9)}, assistant)


def test_modes_name_functions_and_objects_that_exist():
    named = {mode["by"] for mode in MODES.values() if "by" in mode}
    assert named == BY.keys()
    assert OBJECTS.keys() <= MODES.keys()


@pytest.mark.parametrize(
    "name",
    ["greedy", "left padding, sampling", "attentions, assisted", "a streamer", "stop strings"],
)
def test_a_model_is_like_itself_and_unlike_another(name, side):
    mode = MODES[name] | OBJECTS.get(name, {})
    assert result(name, mode, side, side) == "same"
    assert result(name, mode, replace(side, model=side.assistant), side) != "same"


def test_weights_are_returned_by_attention_that_has_them(side):
    before = side.model.config._attn_implementation
    made, error = attempt(MODES["attentions"], side)
    assert error is None
    assert len(made.attentions) == 12
    assert side.model.config._attn_implementation == before


def test_what_fails_or_is_refused_is_told(side, monkeypatch):
    unknown = {"rows": 1, "no_such_option": 1}
    assert result("x", unknown, side, side).startswith("fails as the other side: ValueError: ")
    other = replace(side, model=tiny.llama(layers=2, vocab_size=64, pad_token_id=2))

    def refuse(**_):
        raise UsageError("cannot")

    monkeypatch.setattr(other.model, "generate", refuse)
    assert result("x", {}, other, side) == "refused: cannot"
    assert result("x", unknown, other, side).startswith("refused, where the other side fails: ")
    assert result("x", {}, side, other) == "works, where the other side fails: cannot"


def test_an_unknown_function_is_no_plain_call(side):
    with pytest.raises(KeyError, match="paded"):
        attempt({"by": "paded"}, side)
