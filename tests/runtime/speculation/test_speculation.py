"""Speculation gives the tokens of greedy decoding, whatever proposes them."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import reroll
from reroll.errors import PassError, UsageError
from reroll.evaluate.speculating import drafts_of
from reroll.runtime.speculation.control import Controller
from reroll.runtime.speculation.decode import Ends, speculate
from reroll.runtime.speculation.drafts import Borrowing, Keeping, Lookup, Wish, continued, draft_of
from reroll.runtime.speculation.reading import Reading, begin
from reroll.runtime.speculation.sampling import Sampling, draw, kept
from reroll.runtime.state.growing import GrowingLayer
from tests import captured

IDS = torch.randint(3, 64, (1, 20), generator=torch.Generator().manual_seed(0))
NEW = 30
DELTA = "linearize(mixer=gated_deltanet, window=4, sinks=1)"
SLOTS = "linearize(mixer=gsa, mixer_options={slots: 8}, gates=clustered, samples=2, window=4)"
EVERYTHING = f"window(size={IDS.shape[1] + NEW})"


def rewritten(name: str, passes: str) -> Any:
    program = captured.captured(name)
    tokens = lambda text: [3 + ord(c) % 60 for c in text]  # noqa: E731
    if passes:
        program = reroll.run_passes(program, passes, measure="off", tokenizer=tokens)
    return program.to_module()


@cache
def model(name: str = "llama", passes: str = "") -> Any:
    return rewritten(name, passes)


def greedy(module: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    out: torch.Tensor = module.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return out


def proposed_and_accepted(module: Any, draft: Any, count: int | None = 4) -> tuple[int, int]:
    tokens = reroll.generate(module, IDS, draft, max_new_tokens=NEW, draft_tokens=count, ends=())
    assert torch.equal(tokens, greedy(module))
    counts = module.speculation_report.drafts.values()
    return sum(p for p, _ in counts), sum(a for _, a in counts)


@pytest.mark.parametrize(
    ("name", "passes", "draft"),
    [
        ("llama", "", "window(size=4, sinks=2)"),
        ("llama", "", "window(size=4, sinks=0, layers=[1, 3])"),
        ("llama", "", DELTA),
        ("llama", "", "tie(blocks=2), relax(rank=2)"),
        ("llama", "", "skip(layers=[1])"),
        ("llama", "", "skip(attention=[0], feed_forward=[1, 2])"),
        ("llama", "", "skip(layers=[0, 2]), window(size=4, sinks=2)"),
        ("llama", DELTA, "skip(layers=[2])"),
        ("gemma3", "", "skip(layers=[0, 3])"),
        ("bloom", "", "skip(layers=[1, 2])"),
        ("lfm2", "", "skip(layers=[0, 2])"),
        ("lfm2", "", "skip(attention=[1])"),
        ("llama", "", "insert_exits(at=[2], threshold=0.05)"),
        ("llama", "window(size=8, sinks=2)", "window(size=3, sinks=1)"),
        ("llama", DELTA, "tie(blocks=2)"),
        ("llama", "insert_exits(at=[2], threshold=0.05)", "window(size=4, sinks=2)"),
        ("gemma3", "", "window(size=4, sinks=2)"),
        ("gpt2", "", "window(size=4, sinks=2)"),
        ("bloom", "", "window(size=6, sinks=1)"),
        ("lfm2", "", "window(size=4, sinks=2)"),
    ],
)
def test_tokens_are_the_model_s_own(name: str, passes: str, draft: str) -> None:
    module = model(name, passes)
    assert proposed_and_accepted(module, draft)[0] > 0
    # whatever was measured
    proposed_and_accepted(module, draft, count=None)


@pytest.mark.parametrize("draft", ["auto", "lookup"])
def test_drafts_by_name(draft: str) -> None:
    repeated = IDS[:, :5].repeat(1, 4)
    tokens = reroll.generate(model(), repeated, draft, max_new_tokens=NEW, ends=())
    assert torch.equal(tokens, greedy(model(), repeated))


def test_a_list_of_drafts_is_tried() -> None:
    draft = reroll.twin(model(), "window(size=8)")
    drafts = [draft, "lookup"]
    tokens = reroll.generate(model(), IDS, drafts, max_new_tokens=NEW, ends=())
    assert torch.equal(tokens, greedy(model()))
    assert list(model().speculation_report.drafts) == ["draft", "lookup"]
    assert [name for name, _ in drafts_of(model(), [draft, draft])] == ["draft 1", "draft 2"]


def test_in_half_precision_tokens_part_only_within_rounding() -> None:
    module = captured.captured("llama", torch.bfloat16).to_module()
    tokens = reroll.generate(module, IDS, "window(size=8)", max_new_tokens=NEW, ends=())
    alone = greedy(module)
    first = int((tokens == alone).long().cumprod(1).sum())
    if first < tokens.shape[1]:
        best = module(tokens[:, :first]).logits[0, -1].float().topk(2).values
        assert best[0] - best[1] <= 2**-7 * best[0].abs()


class TestDrafts:
    @pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
    def test_one_that_sees_everything_is_always_right(self, name: str) -> None:
        proposed, accepted = proposed_and_accepted(model(name), EVERYTHING)
        assert proposed == accepted > 0

    def test_so_is_one_with_a_state_of_its_own(self) -> None:
        module = model("llama", DELTA)
        draft = rewritten("llama", DELTA)
        made = Keeping("same", draft)
        counts = _accepted_by(made, module)
        assert counts[0] == counts[1] > 0

    @pytest.mark.parametrize(
        ("passes", "draft", "kind"),
        [
            ("", "window(size=4, sinks=2)", Borrowing),
            ("", "window(size=4, layers=[1])", Borrowing),
            ("window(size=4, sinks=2)", "tie(blocks=2)", Borrowing),
            ("", "skip(layers=[1, 2])", Borrowing),
            ("", "skip(attention=[0], feed_forward=[1]), window(size=4)", Borrowing),
            (DELTA, "skip(layers=[0])", Borrowing),
            ("tie(blocks=2)", "skip(layers=[1, 2])", Borrowing),
            ("", "skip(layers=[1]), tie(blocks=1)", Keeping),
            ("", DELTA, Keeping),
            ("window(size=4, sinks=2)", "window(size=8, sinks=2)", Keeping),
        ],
    )
    def test_where_a_draft_has_its_state(self, passes: str, draft: str, kind: type) -> None:
        module = model("llama", passes)
        made = reroll.twin(model(), draft) if "size=8" in draft else reroll.twin(module, draft)
        assert type(draft_of("", made, begin(module, 1))) is kind

    @pytest.mark.parametrize("draft", [DELTA, SLOTS, "window(size=4, sinks=2)"])
    def test_a_state_goes_back_to_the_tokens_that_were_accepted(self, draft: str) -> None:
        module = rewritten("llama", draft)
        made = Keeping("", module)
        tokens = IDS
        for wrong in (0, 3, 1, 2):
            found = made.propose(list(tokens), Wish(4)).tokens
            # a token that the draft did not propose, after some that it did
            other = (found[:, wrong : wrong + 1] + 1) % 60 + 3
            tokens = torch.cat([tokens, found[:, :wrong], other], 1)
            again, fresh = (d.propose(list(tokens), Wish(4)) for d in (made, Keeping("", module)))
            assert torch.equal(again.tokens, fresh.tokens)

    def test_lookup(self) -> None:
        row = torch.tensor([[5, 6, 7, 8, 9, 4, 6, 7]])
        assert looked_up(row, 3) == [8, 9, 4]
        assert looked_up(torch.tensor([[1, 2, 3]]), 3) == []
        # three of the last tokens are taken before two, and the latest place before others
        row = torch.tensor([[1, 2, 3, 9, 2, 3, 8, 2, 3, 7, 1, 2, 3]])
        assert looked_up(row, 1) == [9]
        assert looked_up(torch.tensor([[2, 3, 8, 2, 3, 7, 2, 3]]), 1) == [7]


def looked_up(row: torch.Tensor, count: int) -> list[int]:
    return Lookup().propose(list(row), Wish(count)).tokens[0].tolist()  # type: ignore[no-any-return]


def _accepted_by(draft: Any, module: Any) -> tuple[int, int]:
    """Tokens that a draft proposes, and those of them that are the model's."""
    tokens, proposed, accepted = greedy(module), 0, 0
    for end in range(IDS.shape[1], tokens.shape[1] - 4, 5):
        found = draft.propose(list(tokens[:, :end]), Wish(4)).tokens
        proposed += found.shape[1]
        accepted += int((found == tokens[:, end : end + 4]).sum())
    return proposed, accepted


class TestTwins:
    def test_it_shares_what_no_pass_has_changed(self) -> None:
        module = model()
        own = {p.data_ptr() for p in module.parameters()}
        windowed = reroll.twin(module, "window(size=4)")
        assert all(p.data_ptr() in own for p in windowed.parameters())
        linear = reroll.twin(module, DELTA)
        added = {n: p for n, p in linear.named_parameters() if p.data_ptr() not in own}
        assert added
        names = dict(module.named_parameters())
        assert not added.keys() & names.keys()
        assert torch.equal(linear(IDS).logits, rewritten("llama", DELTA)(IDS).logits)

    def test_it_has_the_present_weights(self) -> None:
        module = rewritten("llama", "")
        with torch.no_grad():
            for parameter in module.parameters():
                parameter += 0.05
        made = reroll.twin(module, EVERYTHING)
        assert torch.equal(made(IDS).logits, module(IDS).logits)
        assert not torch.equal(made(IDS).logits, model()(IDS).logits)

    def test_transformers_decodes_with_it_both_ways(self) -> None:
        module, original = model(), captured.model("llama")
        made = reroll.twin(module, "window(size=4, sinks=2)")
        options = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": NEW}
        options |= {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        expected = greedy(original)
        assert torch.equal(original.generate(IDS, assistant_model=made, **options), expected)
        assert torch.equal(module.generate(IDS, assistant_model=original, **options), expected)

    def test_a_model_that_is_not_lowered_has_none(self) -> None:
        with pytest.raises(UsageError, match="only a lowered model has a twin"):
            reroll.twin(captured.model("llama"), "window(size=4)")
        with pytest.raises((PassError, UsageError)):
            reroll.twin(model(), "no_such_pass")


class TestGeneration:
    def test_it_ends_where_the_model_does(self) -> None:
        tokens = greedy(model())
        end = int(tokens[0, -10])
        place = tokens[0, IDS.shape[1] :].tolist().index(end)
        cache = DynamicCache(config=model().config)
        found = reroll.generate(
            model(), IDS, EVERYTHING, max_new_tokens=NEW, draft_tokens=8, ends={end}, cache=cache
        )
        assert torch.equal(found, tokens[:, : IDS.shape[1] + place + 1])
        # what was accepted behind the end is not in the cache
        assert cache.get_seq_length() == found.shape[1] - 1

    @pytest.mark.parametrize("new", [1, 2, 7])
    def test_it_adds_no_more_than_it_may(self, new: int) -> None:
        found = reroll.generate(
            model(), IDS, EVERYTHING, max_new_tokens=new, draft_tokens=8, ends=()
        )
        assert torch.equal(found, greedy(model())[:, : IDS.shape[1] + new])

    def test_it_ends_where_a_text_does(self) -> None:
        tokens = greedy(model())
        wanted = tokens[0, IDS.shape[1] + 4 : IDS.shape[1] + 6].tolist()
        ends = Ends(also=lambda row: row[-2:].tolist() == wanted)
        (row,), _ = speculate(
            model(), [IDS[0]], [("draft", model())], max_new_tokens=NEW, count=8, ends=ends
        )
        added = row[IDS.shape[1] :].tolist()
        assert added[-2:] == wanted
        assert added == tokens[0, IDS.shape[1] : len(row)].tolist()
        assert not any(added[n : n + 2] == wanted for n in range(len(added) - 2))

    @pytest.mark.parametrize("passes", ["", DELTA])
    def test_a_cache_goes_on_with_a_conversation(self, passes: str) -> None:
        module = model("llama", passes)
        cache = DynamicCache(config=module.config)
        options: dict[str, Any] = {"cache": cache, "max_new_tokens": 8, "ends": ()}
        first = reroll.generate(module, IDS, "tie(blocks=2)", **options)
        assert cache.get_seq_length() == first.shape[1] - 1
        asked = torch.cat([first, IDS[:, :6]], 1)
        found = reroll.generate(module, asked, "tie(blocks=2)", **options)
        assert torch.equal(found, greedy(module, asked)[:, : found.shape[1]])
        with pytest.raises(UsageError, match="the cache holds"):
            reroll.generate(module, IDS, "lookup", cache=cache)

    def test_what_it_cannot_do_is_said(self) -> None:
        cache = DynamicCache(config=model().config)
        with pytest.raises(UsageError, match="a cache goes on with one row"):
            reroll.generate(model(), IDS.repeat(2, 1), "lookup", cache=cache)
        right = torch.ones_like(IDS).index_fill(1, torch.tensor([19]), 0)
        with pytest.raises(UsageError, match="padding is on the left"):
            reroll.generate(model(), IDS, "lookup", attention_mask=right)
        with pytest.raises(UsageError, match="need a tokenizer"):
            reroll.generate(model(), IDS, "lookup", stop_strings=["a"])
        with pytest.raises(UsageError, match="keeps no cache"):
            reroll.generate(model("bert"), IDS, "lookup", ends=())


class TestNearTies:
    """Two tokens with the same row of the head have the same logits, but for rounding."""

    @pytest.fixture
    def tied(self) -> Any:
        module = rewritten("llama", "")
        often = int(greedy(module)[0, -1])
        other = 2 if often != 2 else 1
        with torch.no_grad():
            head = module.get_output_embeddings().weight
            head[other] = head[often]
        return module

    def test_they_are_listed(self, tied: Any) -> None:
        tokens = reroll.generate(tied, IDS, "tie(blocks=2)", max_new_tokens=NEW, draft_tokens=4)
        ties = tied.speculation_report.near_ties
        assert ties
        logits = tied(tokens).logits[0].topk(2).values
        for tie in ties:
            best = logits[IDS.shape[1] + tie.place - 1]
            assert best[0] - best[1] <= 1e-5 * best[0].abs()
        assert tied.speculation_report.as_data()["near_ties"][0]["row"] == 0

    def test_a_step_of_one_token_decides_them(self, tied: Any) -> None:
        draft = reroll.twin(tied, EVERYTHING)
        options: dict[str, Any] = {"max_new_tokens": NEW, "draft_tokens": 4, "ends": ()}
        reroll.generate(tied, IDS, draft, **options)
        freely = tied.speculation_report
        tokens = reroll.generate(tied, IDS, draft, exact=True, **options)
        exactly = tied.speculation_report
        assert torch.equal(tokens, greedy(tied))
        assert exactly.plain > freely.plain
        assert exactly.near_ties


class TestSampling:
    def test_tokens_have_the_model_s_distribution(self) -> None:
        """Two drafted tokens of six, and the one behind them, many times."""
        torch.manual_seed(0)
        p = torch.rand(3, 6).square()
        q = torch.rand(2, 6).square()
        p[0, 2] = 0.0
        p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
        counts, rounds = torch.zeros(3, 6), 20_000
        for _ in range(rounds):
            proposed = draw(q)
            new = kept(proposed, q, p)
            counts[torch.arange(len(new)), new] += 1
        # each token has the distribution of its place, however many come
        for found, wanted in zip(counts, p, strict=True):
            total = found.sum()
            deviation = (wanted * (1 - wanted) * total).sqrt()
            assert ((found - wanted * total).abs() <= 4.5 * deviation + 1e-6).all()
        # as many are kept as the distributions have in common
        common = torch.minimum(p[0], q[0]).sum()
        assert abs(counts[1].sum() / rounds - common) < 0.015

    @pytest.mark.parametrize("draft", [EVERYTHING, "window(size=4)", "lookup", DELTA])
    def test_it_samples(self, draft: str) -> None:
        def sampled(seed: int, **options: Any) -> torch.Tensor:
            torch.manual_seed(seed)
            options = {"max_new_tokens": NEW, "draft_tokens": 3, "ends": ()} | options
            return reroll.generate(model(), IDS, draft, **options)

        warm = {"temperature": 2.0, "top_k": 30, "top_p": 0.95}
        assert torch.equal(sampled(1, **warm), sampled(1, **warm))
        assert not torch.equal(sampled(1, **warm), sampled(2, **warm))
        if draft == EVERYTHING:
            ((proposed, accepted),) = model().speculation_report.drafts.values()
            assert accepted >= 0.98 * proposed
        # with one token left to draw from, it is the likeliest
        assert torch.equal(sampled(1, temperature=2.0, top_k=1), greedy(model()))

    def test_distributions_are_those_of_transformers(self) -> None:
        logits = model()(IDS).logits[:, -1]
        torch.manual_seed(0)
        scores = model().generate(
            IDS, attention_mask=torch.ones_like(IDS), do_sample=True, temperature=0.7, top_k=20,
            top_p=0.8, max_new_tokens=1, output_scores=True, return_dict_in_generate=True,
        ).scores[0]  # fmt: skip
        found = Sampling(0.7, 20, 0.8).distribution(logits)
        torch.testing.assert_close(found, scores.float().softmax(-1))


class TestController:
    """Rounds of a draft with given costs, in units of a step of the model."""

    def played(self, right: float, drafting: float, verifying: float, rounds: int) -> Controller:
        generator = torch.Generator().manual_seed(0)
        control = Controller(1)
        for _ in range(rounds):
            number, count = control.choose()
            hits = (torch.rand(count, generator=generator) < right).long().cumprod(0)
            time = 1 + verifying * count
            control.add(number, count, [int(hits.sum())], drafting * count, time)
        return control

    def test_what_pays_is_used(self) -> None:
        control = self.played(right=0.95, drafting=0.1, verifying=0.05, rounds=100)
        assert control.plain <= 10
        assert control.records[0].proposed >= 4 * 90

    def test_what_does_not_pay_is_tried_again_less_and_less(self) -> None:
        control = self.played(right=0.02, drafting=0.2, verifying=0.1, rounds=400)
        assert control.plain >= 380
        assert 3 <= control.records[0].rounds <= 12

    def test_what_cannot_pay_is_tried_once(self) -> None:
        control = self.played(right=1.0, drafting=0.9, verifying=0.5, rounds=400)
        assert control.records[0].rounds == 1

    def test_a_token_is_worth_its_time(self) -> None:
        control = self.played(right=0.9, drafting=0.1, verifying=0.05, rounds=100)
        control.choose()
        # its time, and how many tokens come in it anyway
        rate = control.expected
        assert rate > 2
        assert abs(control.worth(0) - (0.1 + 0.05) * rate) < 1e-6


def test_drafting_stops_where_it_is_not_sure() -> None:
    module = model()
    for least, worth, count in ((0.9, 0.75, 2), (0.9, 0.5, 6), (0.5, 0.75, 1), (1.0, 0.75, 8)):
        reading = begin(module, 1)
        with torch.no_grad():
            logits = reading.read(IDS, keep=1)
            proposal = continued(reading, logits, Wish(8, worth=worth, right=lambda _: least))  # noqa: B023
        # the first is proposed anyway; with each further one it is less probable that all are right
        assert proposal.tokens.shape[1] == count
        assert proposal.steps == min(count + 1, 8)
        assert proposal.likely is not None
        assert proposal.likely.shape == (1, count)


def test_how_often_a_draft_is_right_is_learnt_by_its_own_probability() -> None:
    control = Controller(1)
    # right where it is sure, and where it is not, never in between
    for _ in range(30):
        control.judge(0, [0.95, 0.1, 0.5, 0.95], 2)
    assert control.right(0, 0.9) > 0.95
    assert control.right(0, 0.15) > 0.95
    assert control.right(0, 0.55) < 0.2
    # what was never seen is as right as all tokens
    assert 0.5 < control.right(0, 0.7) < 0.95


def test_tokens_that_are_taken_back_leave_the_room_of_a_growing_layer() -> None:
    layer = GrowingLayer()
    layer.update(torch.randn(1, 2, 10, 4), torch.randn(1, 2, 10, 4))
    room = layer.keys.data_ptr()
    layer.take_back(3)
    new = torch.randn(1, 2, 2, 4)
    keys, _ = layer.update(new, new)
    assert keys.data_ptr() == room
    assert keys.shape[2] == 9
    assert torch.equal(keys[:, :, 7:], new)


def test_a_draft_leaves_the_cache_of_the_model_alone() -> None:
    module = model()
    cache = DynamicCache(config=module.config)
    reading = Reading(module, cache)
    with torch.no_grad():
        reading.read(IDS)
        before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
        made = draft_of("", reroll.twin(module, "window(size=4, layers=[1])"), reading)
        made.propose([torch.cat([IDS[0], IDS[0, :1]])], Wish(5))
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)
