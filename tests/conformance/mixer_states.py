"""What holds for the state of every mixer: tokens taken back, rows of a batch, trees of tokens."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor

from reroll.errors import UsageError
from reroll.mixers import Mixer, Tree
from reroll.runtime.functions.recurrences import RecurrentLayer
from tests.conformance.mixer_inputs import (
    BATCH,
    D_K,
    D_V,
    TIME,
    TREES,
    Inputs,
    assert_close,
    draw,
)


class StateSuite:
    """Tests of one mixer in a cache layer; a part of `MixerSuite`."""

    mixer: ClassVar[Mixer]

    # ---- tokens taken back, and rows of different lengths

    @pytest.mark.parametrize(("delay", "skip"), [(0, 0), (3, 0), (2, 4)])
    def test_tokens_that_are_taken_back_were_never_read(self, delay: int, skip: int) -> None:
        inputs = draw(self.mixer)
        found, wanted = (_layer(self.mixer, inputs, delay, skip) for _ in range(2))
        found.layer.activate_past_recording()
        # rounds of (tokens read, of which so many are taken back); several reads in one round
        for reads, removed in (((9,), 0), ((5,), 2), ((1,), 1), ((3, 1, 2), 4), ((4,), 4)):
            start = found.layer.get_seq_length()
            for count in reads:
                found.read(count)
            found.layer.crop(-removed)
            end = found.layer.get_seq_length()
            assert end == start + sum(reads) - removed
            # what is left of the reads, in products of the same shapes
            for count in reads:
                left = min(count, end - wanted.layer.get_seq_length())
                if left > 0:
                    wanted.read(left)
            found.equals(wanted)
        for count in (1, 2, 1):
            assert torch.equal(found.read(count), wanted.read(count))
        found.equals(wanted)

    @pytest.mark.parametrize("side", ["right", "left", "within"])
    def test_rows_of_a_batch_are_what_they_are_alone(self, side: str) -> None:
        inputs = draw(self.mixer)
        prompt, cut = 9, {"right": slice(6, 9), "left": slice(0, 3), "within": slice(4, 7)}[side]
        padding = torch.ones(BATCH, TIME, dtype=torch.bool)
        padding[0, cut] = False
        # whatever stands in padding
        gates = zip(inputs.gates, self.mixer.gates(D_K, D_V), strict=True)
        for tensor in (*inputs[1:3], *(t for t, gate in gates if not gate.constant)):
            tensor[0, :, cut] = torch.nan
        together = _layer(self.mixer, inputs, padding=padding)
        outs = torch.cat([together.read(count) for count in (prompt, 1, 1, 4, 1)], 1)
        for row in range(BATCH):
            seen = padding[row]
            q, k, v, gates_of = inputs.at(seen, slice(row, row + 1))
            state = tuple(s[row : row + 1] for s in inputs.state)
            alone = _layer(self.mixer, Inputs(q, k, v, tuple(gates_of), state))
            length = int(seen[:prompt].sum())
            expected = torch.cat([alone.read(count) for count in (length, 1, 1, 4, 1)], 1)
            read = outs[row : row + 1, seen[: outs.shape[1]]]
            assert_close(read, expected, 1e-12, f"row {row}")

    # ---- trees of tokens

    @pytest.mark.parametrize("parents", TREES)
    def test_each_path_of_a_tree_is_a_sequence(self, parents: list[int]) -> None:
        tree, inputs = Tree(parents), draw(self.mixer, time=len(parents))
        padding = torch.ones(BATCH, len(parents))
        out = self.mixer.tree(*inputs[:4], tree, inputs.state, padding)
        for token in range(len(tree)):
            path = tree.path(token)
            wanted, _ = self.mixer.parallel(*inputs.at(path), inputs.state)
            stepped, _ = self.mixer.recur(*inputs.at(path), inputs.state)
            assert_close(out[:, path], wanted, 1e-12, f"the path to {token}")
            assert_close(out[:, path], stepped, 1e-12, f"the path to {token}, step by step")

    def test_a_tree_of_another_size_is_refused(self) -> None:
        inputs = draw(self.mixer, time=3)
        with pytest.raises(UsageError, match="3 tokens, and 2 in the tree"):
            self.mixer.tree(*inputs[:4], Tree([-1, 0]), inputs.state)

    @pytest.mark.parametrize(("delay", "skip"), [(0, 0), (2, 0), (3, 8), (9, 0)])
    @pytest.mark.parametrize("padded", [False, True])
    def test_behind_the_path_that_is_kept_all_is_as_in_a_sequence(
        self, delay: int, skip: int, padded: bool
    ) -> None:
        parents = TREES[-1]
        past, tree = 5, Tree(parents)
        inputs, padding = draw(self.mixer), None
        if padded:
            padding = torch.ones(BATCH, TIME, dtype=torch.bool)
            padding[0, :2] = False
        found = _layer(self.mixer, inputs, delay, skip, padding)
        found.read(past)
        found.layer.tree = tree
        outs = found.read(len(tree))
        leaf = len(tree) - 1
        path = torch.tensor(tree.path(leaf))
        order = torch.cat([torch.arange(past), past + path, torch.arange(past + len(tree), TIME)])
        q, k, v, gates = inputs.at(order)
        wanted = _layer(self.mixer, Inputs(q, k, v, tuple(gates), inputs.state), delay, skip,
                        None if padding is None else padding[:, order])  # fmt: skip
        wanted.read(past)
        assert_close(outs[:, path], wanted.read(len(path)), 1e-12, "the path")
        with pytest.raises(UsageError, match="those of one path are kept"):
            found.layer.crop(-1)
        found.layer.keep(path, len(tree))
        found.take(order)
        found.equals(wanted, 1e-12)
        for count in (1, 2):
            assert_close(found.read(count), wanted.read(count), 1e-12, "behind the path")

    def test_rows_keep_different_tokens(self) -> None:
        """A token that a row does not keep is padding to it."""
        inputs = draw(self.mixer)
        written = torch.tensor([[True, True, False], [True, False, False]])
        padding = torch.ones(BATCH, TIME, dtype=torch.bool)
        found = _layer(self.mixer, inputs)
        found.layer.activate_past_recording()
        found.read(6)
        found.read(5)
        found.layer.keep(torch.arange(3), 5, written)
        padding[:, 6:9] = written
        wanted = _layer(self.mixer, inputs, padding=padding)
        wanted.read(6)
        wanted.read(3)
        found.equals(wanted, 1e-12)


class _Reading(NamedTuple):
    """A cache layer and the tokens that it is to read, from the first on."""

    layer: RecurrentLayer
    given: list[Any]
    mixer: Mixer
    delay: int
    skip: int

    def read(self, count: int) -> Tensor:
        """Read the next tokens."""
        inputs, padding = self.given
        start = self.layer.get_seq_length()
        q, k, v, gates = inputs.at(slice(start, start + count))
        now = None if padding is None else padding[:, : start + count]
        return self.layer.update(self.mixer, q, k, v, gates, now, self.delay, self.skip)

    def take(self, order: Tensor) -> None:
        """Go on with tokens of this order."""
        inputs, padding = self.given
        q, k, v, gates = inputs.at(order)
        self.given[:] = [
            Inputs(q, k, v, tuple(gates), inputs.state),
            None if padding is None else padding[:, order],
        ]

    def equals(self, other: _Reading, tolerance: float = 0.0) -> None:
        """Both hold the same, bit for bit or up to rounding."""
        for a, b in zip(self.tensors(), other.tensors(), strict=True):
            assert_close(a.double(), b.double(), tolerance, "what is held")

    def tensors(self) -> list[Tensor]:
        waiting = self.layer.waiting or []
        return [*self.layer.recurrent_states.values(), *waiting]


def _layer(
    mixer: Mixer,
    inputs: Inputs,
    delay: int = 0,
    skip: int = 0,
    padding: Tensor | None = None,
) -> _Reading:
    """A cache layer that goes on from the inputs' state."""
    layer = RecurrentLayer()
    layer.recurrent_states = dict(enumerate(inputs.state))
    return _Reading(layer, [inputs, padding], mixer, delay, skip)
