"""The tree of tokens that mixers and attentions are told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from reroll.errors import UsageError
from reroll.mixers import Mixer, Tree, make
from reroll.mixers.diagonal import Diagonal
from reroll.mixers.retention import Retention
from tests.conformance.mixer_inputs import assert_close, draw


def test_what_it_knows_of_its_tokens() -> None:
    tree = Tree([-1, 0, 0, 2, -1, 3])
    assert tree.depth.tolist() == [0, 1, 1, 2, 0, 3]
    assert tree.path(5) == [0, 2, 3, 5]
    assert tree.height == 4
    assert [level.tolist() for level in tree.levels] == [[0, 4], [1, 2], [3], [5]]
    values = torch.arange(1.0, 7)[:, None]
    assert tree.sums(values)[:, 0].tolist() == [1, 3, 4, 8, 5, 14]


@pytest.mark.parametrize("distance", range(6))
def test_what_came_some_tokens_before(distance: int) -> None:
    tree, kept = Tree([-1, 0, 0, 2, -1, 3]), 5
    places = tree.before(distance, kept)
    for token in range(len(tree)):
        whole = [*range(kept), *(kept + n for n in tree.path(token))]
        assert int(places[token]) == whole[-1 - distance]


def test_tokens_that_are_chains() -> None:
    assert Tree([-1, 0, 0]).repeated(2).parents.tolist() == [-1, 0, 1, 2, 1, 4]


@pytest.mark.parametrize("parents", [[-1, 1], [-2], [0], [], [[-1]]])
def test_what_is_no_tree(parents: Any) -> None:
    with pytest.raises(UsageError, match="parent"):
        Tree(parents)


class _Twice(Retention):
    """A mixer whose forms are its own, with the tree form of none."""

    name = "twice"

    def step_form(self, q: Tensor, k: Tensor, v: Tensor, gates: Any, state: Any) -> Any:
        return super().step_form(q, k, 2 * v, gates, state)


def test_a_mixer_of_other_forms_does_not_inherit_that_of_a_tree() -> None:
    assert Retention.tree_form is Diagonal.tree_form
    assert _Twice.tree_form is Mixer.tree_form
    mixer, tree = _Twice(), Tree([-1, 0, 0, 2])
    inputs = draw(make("retention"), time=4)
    out = mixer.tree(*inputs[:4], tree, inputs.state)
    for token in range(4):
        path = tree.path(token)
        assert_close(out[:, path], mixer.recur(*inputs.at(path), inputs.state)[0], 1e-12, "path")
