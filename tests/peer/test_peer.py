"""A quick part of transformers' own tests, on two kinds; `make peer-tests` runs all."""

from __future__ import annotations

import unittest

import pytest
import torch

from benchmarks.generation_modes import difference
from tests.peer.distribution import COMMAND, fetched
from tests.peer.suites import case_of, last_line, names_of, outcome

QUICK = [
    "test_batching_equivalence",
    "test_determinism",
    "test_hidden_states_output",
    "test_inputs_embeds_matches_input_ids",
    "test_load_contiguous_weights",
    "test_tied_weights_keys",
    "test_training_gradient_checkpointing",
]


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("kind", ["llama", "window"])
def test_lowered_models_pass(kind: str, name: str) -> None:
    if not fetched():
        pytest.skip(f"transformers' tests are not there: {COMMAND}")
    state, said = outcome(case_of(kind, lowered=True), name)
    assert state == "passed", said


class _Case(unittest.TestCase):
    # run by the test below alone
    __test__ = False

    def test_passes(self) -> None:
        torch.set_default_dtype(torch.float64)

    def test_fails(self) -> None:
        raise ValueError("a value\nhint: another")

    def test_is_skipped(self) -> None:
        self.skipTest("a reason")

    def test_hangs(self) -> None:
        while True:
            pass


def test_outcomes_are_told_apart() -> None:
    assert names_of(_Case, ["fail", "pass"]) == ["test_fails", "test_passes"]
    assert outcome(_Case, "test_passes") == ("passed", "")
    assert torch.get_default_dtype() == torch.float32
    assert outcome(_Case, "test_is_skipped") == ("skipped", "a reason")
    state, said = outcome(_Case, "test_fails")
    assert (state, last_line(said)) == ("failed", "ValueError: a value")
    state, said = outcome(_Case, "test_hangs", seconds=1)
    assert (state, last_line(said)) == ("failed", "TimeoutError: took longer than 1 seconds")


def test_results_of_generate_are_compared() -> None:
    tokens, scores = torch.tensor([[1, 2]]), (torch.tensor([0.0, -torch.inf, 1.0]),)
    made = {"sequences": tokens, "scores": scores, "past_key_values": object()}
    assert difference(made, {**made, "past_key_values": None}) == ""
    assert difference({"sequences": tokens}, made) == "without scores"
    assert difference({**made, "sequences": tokens + 1}, made) == "other sequences"
    assert difference(tokens[:, :1], tokens) == "tokens: [1, 1] for [1, 2]"
    moved = {**made, "scores": (torch.tensor([0.0, -torch.inf, 1.5]),)}
    assert difference(moved, made) == "scores differ by 0.5"
    finite = {**made, "scores": (torch.zeros(3),)}
    assert difference(finite, made) == "scores: other infinities"
