"""Drafts that are the model itself on some of its trips."""

from __future__ import annotations

import gc
from itertools import combinations
from typing import Any

import pytest
import torch

import reroll
from reroll.errors import UsageError
from reroll.runtime.speculation.choosing import (
    _Choosing,
    best_path,
    by_agreement,
    least_influence,
    read_only,
)
from reroll.runtime.speculation.drafts import Wish, draft_of
from reroll.runtime.speculation.leaving import Del, DelOptions
from reroll.runtime.speculation.named import named
from reroll.runtime.speculation.reading import Reading, begin
from reroll.runtime.speculation.skip_sets import StaticSkip, StaticSkipOptions
from reroll.runtime.speculation.skipping import Skipping, inputs_of
from tests import captured
from tests.runtime.speculation.test_speculation import (
    IDS,
    NEW,
    model,
    proposed_and_accepted,
    rewritten,
)


def filled(module: Any, ids: torch.Tensor) -> Reading:
    reading = begin(module, 1)
    # as in a verification, windows keep what the tokens that are read see
    reading.record()
    with torch.no_grad():
        reading.read(ids)
    return reading


@pytest.mark.parametrize(
    ("name", "draft"),
    [
        ("llama", "static-skip(skip=2)"),
        ("llama", "static-skip(skip=2, by=influence, tokens=8)"),
        ("llama", "static-skip(skip=1, by=agreement)"),
        ("llama", "clasp(skip=2, every=1)"),
        ("llama", "del(every=1)"),
        ("gemma3", "clasp(skip=3, every=1)"),
        ("gemma3", "del(exits=[1])"),
        ("gpt2", "clasp"),
        ("bloom", "clasp(skip=3, every=1)"),
        ("lfm2", "static-skip"),
        ("lfm2", "del(exits=[1])"),
    ],
)
def test_tokens_are_the_model_s_own(name: str, draft: str) -> None:
    module = model(name)
    assert proposed_and_accepted(module, draft)[0] > 0
    proposed_and_accepted(module, draft, count=None)


@pytest.mark.parametrize("draft", ["static-skip(skip=2)", "clasp(skip=2, every=1)", "del(every=1)"])
def test_in_half_precision_tokens_part_only_within_rounding(draft: str) -> None:
    module = captured.captured("llama", torch.bfloat16).to_module()
    options: dict[str, Any] = {"max_new_tokens": NEW, "ends": ()}
    tokens = reroll.generate(module, IDS, draft, draft_tokens=4, **options)
    alone = reroll.generate(module, IDS, [], **options)
    first = int((tokens == alone).long().cumprod(1).sum())
    if first < tokens.shape[1]:
        best = module(tokens[:, :first]).logits[0, -1].float().topk(2).values
        assert best[0] - best[1] <= 2**-7 * best[0].abs()


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_rows_of_a_batch_are_drafted_together(name: str) -> None:
    rows = torch.cat([IDS, IDS.flip(1)])
    options: dict[str, Any] = {"max_new_tokens": NEW, "ends": ()}
    tokens = reroll.generate(model(name), rows, "static-skip(skip=1)", draft_tokens=4, **options)
    alone = [reroll.generate(model(name), row[None], [], **options) for row in rows]
    assert torch.equal(tokens, torch.cat(alone))


class Fixed(Skipping):
    """A draft of given trips."""

    def __init__(self, model: Reading, chosen: list[int]) -> None:
        super().__init__("", model)
        self.chosen = chosen

    def choose(self, row: torch.Tensor, count: int) -> tuple[list[int], int]:
        return self.chosen, count


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "bloom"])
@pytest.mark.parametrize("run", [[0, 1, 2], [1, 2, 3], [0, 3], [1, 2]])
def test_it_is_the_draft_that_the_pass_makes(name: str, run: list[int]) -> None:
    module = model(name)
    reading = filled(module, IDS[:, :-1])
    left_out = [n for n in range(4) if n not in run]
    twin = draft_of("", reroll.twin(module, f"skip(layers={left_out})"), reading)
    layers = reading.cache.layers
    before = [(layer.keys.clone(), layer.values.clone()) for layer in layers]
    with torch.no_grad():
        found = Fixed(reading, run).propose(list(IDS), Wish(5)).tokens
        assert torch.equal(found, twin.propose(list(IDS), Wish(5)).tokens)
    # and the model is left as it was
    for layer, (keys, values) in zip(layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)
    with torch.no_grad():
        assert torch.equal(module(IDS).logits, model(name)(IDS).logits)


def test_masks_need_a_trip_of_each_kind() -> None:
    # windows in the even layers, everything in the odd ones
    module = model("gemma3")
    made = Fixed(filled(module, IDS[:, :-1]), [0, 2])
    assert made.completed([0, 2]) == [0, 1, 2]
    with torch.no_grad():
        assert made.propose(list(IDS), Wish(4)).tokens.shape == (1, 4)


class TestChoosing:
    def states(self, module: Any, ids: torch.Tensor) -> list[torch.Tensor]:
        made = StaticSkip("", begin(module, 1), list(ids), StaticSkipOptions(skip=1))
        with torch.no_grad():
            return made.states_of(inputs_of(module, ids, 0))

    def test_states_are_those_of_the_model(self) -> None:
        module = model()
        expected = module(IDS, output_hidden_states=True).hidden_states
        states = self.states(module, IDS)
        assert len(states) == 5
        # of the last, transformers has what the norm makes
        for found, wanted in zip(states[:4], expected[:4], strict=True):
            assert torch.equal(found, wanted[0])

    @pytest.mark.parametrize("skip", [1, 2, 3])
    def test_the_path_is_that_of_the_recurrence(self, skip: int) -> None:
        """Each state computed alone, by a model of just the trips on its path."""
        module = model()
        states = self.states(module, IDS)
        trips = module._assembly.loops["model.layers"]
        inputs = inputs_of(module, IDS, 0)

        def behind(run: list[int]) -> torch.Tensor:
            """The hidden state behind these trips."""
            seen = [states[0]]
            handles = [
                trips.modules[n].register_forward_hook(lambda _, a, out: seen.append(out[0][0]))
                for n in run
            ]
            with torch.no_grad(), trips.running(run):
                module(**inputs, use_cache=False)
            for handle in handles:
                handle.remove()
            return seen[-1]

        paths: dict[int, list[int]] = {0: []}
        for trip in range(4):
            new = {}
            for left in range(min(skip, trip + 1) + 1):
                tried = []
                if left in paths:
                    tried.append([*paths[left], trip])
                if left - 1 in paths:
                    tried.append(paths[left - 1])
                cosines = [
                    torch.cosine_similarity(behind(run), states[trip + 1], dim=-1).mean()
                    for run in tried
                ]
                new[left] = tried[max(range(len(tried)), key=cosines.__getitem__)]
            paths = new
        with torch.no_grad():
            found = best_path(module, "model.layers", inputs, None, states, skip)
        assert found == paths[skip]
        assert len(found) == 4 - skip

    @pytest.mark.parametrize("name", ["llama", "gemma3", "bloom"])
    def test_behind_a_cache_the_model_s_keys_are_read(self, name: str) -> None:
        """With nothing to leave out, each state is the model's own, so that all trips run."""
        module = model(name)
        reading = filled(module, IDS)
        watching = Fixed(reading, [])
        with torch.no_grad():
            filled(module, IDS[:, :-1]).read(IDS[:, -1:])
        states = [each[0] for each in watching.observed.states]
        assert watching.observed.past == IDS.shape[1] - 1
        inputs = inputs_of(module, IDS[:, -1:], IDS.shape[1] - 1)
        seen: list[torch.Tensor] = []
        step = _Choosing.step

        def watched(self: Any, before: torch.Tensor, ran: torch.Tensor) -> torch.Tensor:
            seen.append(ran[0])
            return step(self, before, ran)

        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr(_Choosing, "step", watched)
            run = best_path(
                module, watching.loop, inputs, read_only(module, reading.cache, 1), states, 0
            )
        assert run == [0, 1, 2, 3]
        for found, wanted in zip(seen, states[1:], strict=True):
            torch.testing.assert_close(found, wanted)

    def test_influence(self) -> None:
        rows = [[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.2, 1.0]]
        states = [torch.tensor([row]) for row in rows]
        assert least_influence(states, 1) == [1, 2]
        assert least_influence(states, 2) == [1]

    def test_agreement_leaves_out_what_changes_least(self) -> None:
        module = model("gemma3")
        inputs = inputs_of(module, IDS, 0)
        trips = module._assembly.loops["model.layers"]

        def right(run: Any) -> int:
            with torch.no_grad(), trips.running(run):
                return int((module(**inputs).logits.argmax(-1) == wanted).sum())

        wanted = module(**inputs).logits.argmax(-1)
        with torch.no_grad():
            found = by_agreement(module, "model.layers", inputs, 1)
        assert right(found) == max(right(run) for run in combinations(range(4), 3))


class TestLeaving:
    def made(self, model: Reading, **options: Any) -> Del:
        return Del("del", model, list(IDS), DelOptions(**options))

    def test_shadow_tokens_are_judged_by_what_the_model_has_verified(self) -> None:
        module, original = model("gemma3"), captured.model("gemma3")
        reading = filled(module, IDS[:, :-6])
        made = self.made(reading, exits=[1, 3])
        with torch.no_grad():
            hidden = module(IDS, output_hidden_states=True).hidden_states
            reading.read(IDS[:, -6:-1])
            made._judge(IDS[0])
            for each in (1, 3):
                shadow = original.lm_head(original.model.norm(hidden[each])).argmax(-1)
                wanted = (shadow[:, -6:-1] == IDS[:, -5:]).float().mean().item()
                assert made.right[each].or_else(-1.0) == pytest.approx(wanted)

    def test_the_exit_with_the_most_tokens_in_a_second_is_taken(self) -> None:
        module = model()
        made = self.made(filled(module, IDS[:, :-1]), exits=[1, 3])
        for each, right, seconds in ((1, 0.3, 0.1), (3, 0.9, 0.3)):
            for _ in range(20):
                made.right[each].add(right)
                made.seconds[each].add(seconds)
        made.verifying.add(1.0)
        assert made._best(8)[0] == 3
        for _ in range(60):
            made.right[1].add(0.85)
        assert made._best(8)[0] == 1
        # tokens that are hardly ever right are not worth many
        for _ in range(80):
            made.right[1].add(0.05)
            made.right[3].add(0.05)
        assert made._best(8)[1] == 1

    def test_exits_of_the_pass_are_taken(self) -> None:
        module = rewritten("llama", "insert_exits(at=[1, 2], threshold=0.05)")
        assert self.made(filled(module, IDS[:, :-1])).exits == [1, 2]
        assert self.made(filled(model(), IDS[:, :-1])).exits == [1, 2, 3]


def test_a_draft_that_is_gone_watches_no_more() -> None:
    module = model()
    hooks = module._assembly.loops["model.layers"].modules[0]._forward_hooks
    gc.collect()
    before = len(hooks)
    made = Fixed(filled(module, IDS), [0])
    assert len(hooks) == before + 1
    del made
    gc.collect()
    assert len(hooks) == before


def test_what_it_cannot_do_is_said() -> None:
    def asked(name: str, draft: str) -> None:
        reroll.generate(model(name), IDS, draft, ends=())

    with pytest.raises(UsageError, match="4 trips cannot be left out of 4"):
        asked("llama", "clasp(skip=4)")
    with pytest.raises(UsageError, match="no option 'layers'"):
        asked("llama", "clasp(layers=4)")
    with pytest.raises(UsageError, match="static-skip chooses on the prompt"):
        asked("lfm2", "clasp")
    with pytest.raises(UsageError, match="ascending"):
        asked("llama", "del(exits=[3, 2])")
    with pytest.raises(UsageError, match="one row of tokens"):
        reroll.generate(model(), IDS.repeat(2, 1), "clasp", ends=())
    with pytest.raises(UsageError, match="several trips"):
        flat = captured.flat("llama").to_module()
        named("clasp", begin(flat, 1), list(IDS))
    exits = rewritten("llama", "insert_exits(at=[2], threshold=0.05)")
    with pytest.raises(UsageError, match="carries"):
        reroll.generate(exits, IDS, "clasp", ends=())
