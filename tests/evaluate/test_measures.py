"""Measures on models whose answers are known, and against plain computations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

import reroll
from reroll.errors import UsageError
from reroll.evaluate.measure import NotApplicable, find, measures
from reroll.evaluate.measures import listops, state_tracking
from reroll.evaluate.measures.generation import agreement, style
from reroll.evaluate.measures.perplexity import Text
from reroll.evaluate.runner import Runner
from reroll.evaluate.subjects import open_subject
from reroll.evaluate.tokenizing import plain_ids
from reroll.rewrite.analysis.samples import sample_text
from tests import tiny
from tests.evaluate import fakes

pytestmark = pytest.mark.usefixtures("captured_once")

RECALL = {"lengths": [160, 240], "pairs": [6], "entries": [5], "samples": 2}


def run(name: str, bench: Any, **options: Any) -> dict[str, Any]:
    return find(name).make(options).run(bench)


def test_every_measure_says_what_it_is() -> None:
    assert len(measures()) == 9
    for name, measure in measures().items():
        assert measure.summary(), name
        assert all(option.help for option in measure.options().values()), name
        # the values of the full suite are allowed, and are not those of the quick one
        full = measure.of_suite("full", {})
        assert full.changed_options(), name


# ---- pieces


def gemma() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    config = Gemma2Config(vocab_size=tiny.WORDS, sliding_window=16, **sizes)
    torch.manual_seed(0)
    return Gemma2ForCausalLM(config).eval()


def windowed() -> Any:
    made = reroll.capture(tiny.llama())
    return reroll.run_passes(made, "window(size=9, sinks=2)", measure=False).to_module()


@pytest.mark.parametrize("make", [tiny.llama, gemma, windowed])
def test_logits_in_pieces_are_those_of_one_forward(make: Any) -> None:
    model = make()
    ids = torch.randint(0, tiny.WORDS, (2, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(input_ids=ids).logits
    # 23 tokens at once, and logits of 7 positions
    pieces = fakes.runner(model, chunk=23, budget=2 * 7 * tiny.WORDS)
    for wanted in (None, [0, 3, 24, 25, 26, 49], [30]):
        found = list(pieces.logits(ids, wanted))
        positions = torch.cat([p for p, _ in found])
        assert positions.tolist() == (list(range(50)) if wanted is None else wanted)
        assert all(logits.shape[1] <= 7 for _, logits in found)
        logits = torch.cat([each for _, each in found], dim=1)
        torch.testing.assert_close(logits, whole[:, positions], rtol=1e-4, atol=1e-4)


def test_a_model_without_a_cache_sees_everything_at_once() -> None:
    pieces = fakes.runner(fakes.copier(), chunk=4)
    ids = torch.tensor([[5, 6, 7, 8, 9, 5]])
    ((positions, logits),) = pieces.logits(ids, [5])
    assert positions.tolist() == [5]
    assert logits.argmax(-1).tolist() == [[6]]


def test_greedy_is_what_transformers_generates() -> None:
    model = tiny.llama()
    prompt = torch.tensor([[0, 40, 50, 60], [0, 70, 80, 90]])
    expected = model.generate(
        prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False, eos_token_id=None
    )
    assert fakes.runner(model).greedy(prompt, 6).tolist() == expected[:, 4:].tolist()


def test_the_window_of_a_model() -> None:
    made = reroll.capture(tiny.llama())
    assert Runner(open_subject(made)).window is None
    near = reroll.run_passes(made, "window(size=9)", measure=False)
    assert Runner(open_subject(near)).window == 9
    mixed = reroll.run_passes(made, "window(size=9, keep=[1])", measure=False)
    assert Runner(open_subject(mixed)).window is None


# ---- perplexity


@pytest.mark.parametrize("style", ["block", "sliding"])
def test_perplexity_of_a_uniform_model_is_its_vocabulary(style: str) -> None:
    found = run("perplexity", fakes.bench(fakes.uniform()), contexts=[32, 64], style=style)
    for at in found["model"]["contexts"]:
        assert at["perplexity"] == pytest.approx(tiny.WORDS, rel=1e-5)
        bits = at["tokens"] * math.log2(tiny.WORDS) / at["bytes"]
        assert at["bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_perplexity_of_a_model_that_knows_the_text_is_one() -> None:
    text = "abc" * 100
    found = run("perplexity", fakes.bench(fakes.copier(), text=text), contexts=[32])
    tokens = len(plain_ids(tiny.tokenizer(), text))
    assert tokens > 64
    # all but the first tokens of a window can be copied
    assert found["model"]["contexts"][0]["perplexity"] < 2.5


def test_sliding_windows_count_each_token_once() -> None:
    model = tiny.llama()
    found = run(
        "perplexity", fakes.bench(model), contexts=[48], style="sliding", stride=20, tokens=300
    )
    (at,) = found["model"]["contexts"]
    ids = plain_ids(tiny.tokenizer(), sample_text())[:300]
    loss, count, done = 0.0, 0, 0
    for start in range(0, 300 - 47 + 1, 20):
        row = torch.tensor([[0, *ids[start : start + 47]]])
        with torch.no_grad():
            log = model(input_ids=row).logits.double().log_softmax(-1)[0]
        for place in range(47):
            if start + place >= done:
                loss -= float(log[place, row[0, place + 1]])
                count += 1
        done = start + 47
    assert at["tokens"] == count
    assert at["perplexity"] == pytest.approx(math.exp(loss / count), rel=1e-4)


def test_bytes_are_those_of_the_text() -> None:
    text = "naïve café, 日本語 and 🙂🙂 again\n\n" * 3
    made = Text(fakes.runner(fakes.uniform()), text, 0)
    assert made.bytes_from == "offsets"
    assert made.bytes(0, len(made.ids)) == len(text.encode())
    parts = [made.bytes(n, n + 1) for n in range(len(made.ids))]
    assert sum(parts) == len(text.encode())
    assert min(parts) >= 0


def test_contexts_that_do_not_fit_are_left_out() -> None:
    found = run("perplexity", fakes.bench(tiny.llama()), contexts=[64, 2048])
    assert found["model"]["left_out"] == [2048]
    # where the model takes none of them, the longest that it does
    found = run("perplexity", fakes.bench(tiny.llama()), contexts=[2048])
    assert [c["context"] for c in found["model"]["contexts"]] == [512]
    with pytest.raises(NotApplicable, match="no context fits"):
        run("perplexity", fakes.bench(tiny.llama(), text="too short"), contexts=[128])


# ---- agreement and generation


def test_agreement_of_a_model_with_itself() -> None:
    bench = fakes.bench(tiny.llama(), tiny.llama())
    (at,) = run("agreement", bench, contexts=[64], tokens=256)["model"]["contexts"]
    assert at["kl"] == 0
    assert at["top1_agreement"] == at["top1_in_top5"] == 1
    assert at["tokens"] == 4 * 64


def test_kl_of_known_distributions() -> None:
    # the original is uniform over v tokens; the model puts e^s on one of them
    bench = fakes.bench(fakes.FakeForCausalLM(lambda ids: 7, sure=3.0), fakes.uniform())
    (at,) = run("agreement", bench, contexts=[32], tokens=64)["model"]["contexts"]
    v, s = tiny.WORDS, 3.0
    kl = math.log(v - 1 + math.exp(s)) - s / v - math.log(v)
    assert at["kl"] == pytest.approx(kl, rel=1e-4)


def test_agreement_needs_an_original() -> None:
    with pytest.raises(NotApplicable, match="--against"):
        run("agreement", fakes.bench(fakes.uniform()))


def test_repetition_and_distinct_by_hand() -> None:
    # 4-grams of the first: 1212 2121 1212 2121 12; of the second four that differ
    found = style([[1, 2, 1, 2, 1, 2, 1], [1, 2, 3, 4, 5, 6, 7]])
    assert found["repetition"] == pytest.approx((1 - 2 / 4 + 0) / 2)
    assert found["distinct"]["1"] == pytest.approx(7 / 14)
    assert found["distinct"]["2"] == pytest.approx((2 + 6 - 1) / 12)
    assert agreement([1, 2, 3], [1, 2, 4]) == 2
    assert agreement([1, 2], [1, 2]) == 2


def test_generation_finds_a_loop_and_where_it_leaves_the_original() -> None:
    found = run(
        "generation", fakes.bench(fakes.cycle(5), fakes.cycle(8)), prompts=3, prompt=8, new=24
    )
    # 21 4-grams, 5 or 8 of them distinct
    assert found["model"]["repetition"] == pytest.approx(1 - 5 / 21)
    assert found["original"]["repetition"] == pytest.approx(1 - 8 / 21)
    assert found["text"]["repetition"] < 0.1
    assert found["model"]["agreement_tokens"] < 5
    same = run("generation", fakes.bench(fakes.cycle(5), fakes.cycle(5)), prompts=2, new=8)
    assert same["model"]["agreement_tokens"] == 8
    assert same["model"]["identical"] == 1


# ---- recall


def test_a_copier_recalls_everything() -> None:
    found = run("recall", fakes.bench(fakes.copier()), **RECALL)
    assert set(found["model"]) == {"needle", "passkey", "mqar", "phonebook"}
    for task, each in found["model"].items():
        assert each["accuracy"] == each["exact"] == 1, task
        assert each["beyond"] is None, task


def test_a_uniform_model_recalls_by_chance() -> None:
    found = run("recall", fakes.bench(fakes.uniform()), **RECALL)
    for task, each in found["model"].items():
        assert each["accuracy"] == pytest.approx(each["chance"]), task
        assert 0 < each["exact"] <= 1 / tiny.WORDS + 1e-9, task
    assert found["model"]["needle"]["chance"] == 1 / 16
    assert found["model"]["mqar"]["chance"] == pytest.approx(1 / 6)


def test_a_windowed_copier_recalls_inside_its_window_only() -> None:
    window = 100
    found = run("recall", fakes.bench(fakes.copier(window)), window=window, **RECALL)
    for task in ("needle", "passkey"):
        each = found["model"][task]
        assert each["inside_exact"] == 1, task
        # a copier that finds nothing copies something else
        assert each["beyond_exact"] == 0, task
        for cell in each["cells"]:
            assert cell["exact"] == (cell["distance"] < window), (task, cell)


def test_contexts_have_the_length_and_depth_that_they_say() -> None:
    from reroll.evaluate.measures.recall_tasks import needle, passkey

    bench = fakes.bench(fakes.uniform())
    for make in (needle, passkey):
        distances = []
        for depth in (0.0, 0.5, 1.0):
            made = make(bench, bench.model, 200, depth, 0)
            assert made is not None
            question, distance = made
            answer = question.candidates[question.truth]
            assert len(question.prompt) + len(answer) == 200
            start = len(question.prompt) - 1 - distance
            assert question.prompt[start : start + len(answer)] == answer
            distances.append(distance)
        first, middle, last = distances
        assert middle == pytest.approx((first + last) / 2, abs=1)
        assert first - last > 200 / 3
        assert make(bench, bench.model, 40, 0.5, 0) is None


def test_a_copier_copies_as_far_as_its_window() -> None:
    lengths = {"lengths": [30, 60], "passages": 2}
    for window, wanted in ((None, [1, 1]), (45, [1, 0])):
        found = run("copying", fakes.bench(fakes.copier(window)), **lengths)["model"]["lengths"]
        for at, share in zip(found, wanted, strict=True):
            if share:
                assert at["again"] == 1
                assert at["loss_again"] < 0.1
            else:
                assert at["again"] < 0.5
            assert at["first"] < 0.5


def test_copying_with_chance_is_the_logarithm_of_the_vocabulary() -> None:
    found = run("copying", fakes.bench(fakes.uniform()), lengths=[40], passages=2)["model"]
    (at,) = found["lengths"]
    assert at["loss_first"] == pytest.approx(math.log(tiny.WORDS), rel=1e-5)
    assert at["loss_again"] == pytest.approx(math.log(tiny.WORDS), rel=1e-5)
    assert at["passages"] == 2
    with pytest.raises(UsageError, match="17 or more, not 16"):
        run("copying", fakes.bench(fakes.uniform()), lengths=[16])


# ---- state tracking and ListOps

TRACKING = {"lengths": [3, 5], "samples": 6, "shots": 2}


def test_a_solver_tracks_every_state() -> None:
    found = run("state_tracking", fakes.bench(fakes.solver()), **TRACKING)["model"]
    for task in state_tracking.TASKS:
        assert found[task]["accuracy"] == 1, task
        assert found[task]["exact"] == 1, task
    assert found["tokenizer_effect"] == 0


def test_a_uniform_model_tracks_by_chance() -> None:
    found = run("state_tracking", fakes.bench(fakes.uniform()), **TRACKING)["model"]
    for task in state_tracking.TASKS:
        assert found[task]["accuracy"] == pytest.approx(found[task]["chance"]), task
    assert found["parity"]["chance"] == 0.5


def test_always_the_same_answer_is_right_as_often_as_chance() -> None:
    text = {"even": plain_ids(tiny.tokenizer(), " even")[0]}
    model = fakes.FakeForCausalLM(lambda ids: text["even"])
    found = run("state_tracking", fakes.bench(model), tasks=["parity"], lengths=[6])["model"]
    assert found["parity"]["accuracy"] == pytest.approx(0.5)


def test_the_tokenizers_effect_on_counting() -> None:
    """A model that counts tokens is right where each letter is one, and wrong where they merge."""
    tokenizer = tiny.tokenizer(prefix=True)
    solve = fakes.solver().rule

    def blind(ids: list[int]) -> int | None:
        last = tokenizer.decode(ids[1:]).rpartition("Letters: ")[2]
        separated = " " in last.partition("\n")[0]
        return solve(ids) if separated else None

    found = run(
        "state_tracking",
        fakes.bench(fakes.FakeForCausalLM(blind)),
        tasks=["counting_separated", "counting_merged"],
        **TRACKING,
    )["model"]
    assert found["tokenizer_effect"] == pytest.approx(1 - found["counting_merged"]["chance"])


def test_how_far_a_tokenizer_merges_letters() -> None:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=tiny.WORDS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator(["abcacbbacbcacabcbaaabbcc"] * 9, trainer)
    bench = fakes.bench(fakes.uniform())
    bench.model.subject.__dict__["tokenizer"] = PreTrainedTokenizerFast(tokenizer_object=made)
    found = run("state_tracking", bench, lengths=[8], samples=4)["model"]
    assert found["counting_merged"]["tokens_per_item"] < 0.9
    assert found["counting_separated"]["tokens_per_item"] > 1


def test_shots_are_not_the_question() -> None:
    random = fakes.bench(fakes.uniform()).random("shots")
    for turn in range(8):
        asked = state_tracking.parity(random, 3, turn, 0)
        shot = state_tracking._shot(state_tracking.parity, random, 3, turn, asked, 0)
        assert shot.question != asked.question


def test_a_solver_solves_listops_and_a_uniform_model_guesses() -> None:
    options: dict[str, Any] = {"symbols": [12, 40], "samples": 5, "shots": 2}
    found = run("listops", fakes.bench(fakes.solver()), **options)["model"]
    assert found["accuracy"] == found["exact"] == 1
    found = run("listops", fakes.bench(fakes.uniform()), **options)["model"]
    assert found["accuracy"] == pytest.approx(0.1)


def test_listops_values_by_hand() -> None:
    tree = ("MAX", [2, ("MIN", [8, 3]), ("SM", [9, 4]), ("MED", [1, 4, 9])])
    assert listops.write(tree) == "[MAX 2 [MIN 8 3 ] [SM 9 4 ] [MED 1 4 9 ] ]"
    assert listops.value(tree) == 4
    assert listops.size(tree) == 2 + 1 + 4 + 4 + 5
    assert listops.value(("MED", [1, 2, 8, 9])) == 5


def test_listops_trees_have_the_size_of_long_range_arena() -> None:
    random = fakes.bench(fakes.uniform()).random("trees")
    for _ in range(3):
        tree = listops.draw(random, 500, 2000)
        assert 500 <= listops.size(tree) <= 2000
        assert len(listops.write(tree).split()) == listops.size(tree)


# ---- speed and cost


def test_speed_of_both_sides_over_the_context() -> None:
    made = reroll.run_passes(reroll.capture(tiny.llama()), "window(size=8)", measure=False)
    bench = fakes.bench(tiny.llama(), tiny.llama())
    bench.model = Runner(open_subject(made))
    found = run("speed", bench, contexts=[16, 64], decode=2, rounds=1)
    for side in ("model", "original"):
        for at in found[side]["contexts"]:
            assert at["prefill_tokens_per_second"] > 0
            assert at["decode_tokens_per_second"] > 0
    states = [at["state_bytes"] for at in found["model"]["contexts"]]
    assert states[0] == states[1] > 0
    assert len(found["ratio"]["contexts"]) == 2


def test_cost_by_hand() -> None:
    model = tiny.llama()
    plain = run("cost", _opened(reroll.capture(model)), contexts=[128, 256])["model"]
    table = tiny.WORDS * 32 * 4
    weights = sum(p.numel() for p in model.parameters()) * 4
    assert plain["weight_bytes"] == weights
    # all but the table of embeddings, of which one row is read; and the four rotary frequencies
    assert plain["weight_bytes_read"] - 4 * 4 == weights - table + 32 * 4
    state = 4 * 2 * 2 * 8 * 4 * 128
    assert plain["contexts"][0]["state_bytes"] == state
    assert plain["contexts"][0]["bytes_per_token"] == plain["weight_bytes_read"] + state
    tied = reroll.run_passes(reroll.capture(model), "tie(blocks=2)", measure=False)
    shared = run("cost", _opened(tied), contexts=[128])["model"]
    # shared weights are stored once and gone through as often as before
    assert shared["weight_bytes"] < weights
    assert shared["weight_bytes_read"] == plain["weight_bytes_read"]


def _opened(program: Any) -> Any:
    bench = fakes.bench(fakes.uniform())
    bench.model = Runner(open_subject(program))
    return bench


# ---- options


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("perplexity", {"contexts": [2]}),
        ("perplexity", {"style": "diagonal"}),
        ("recall", {"tasks": ["haystack"]}),
        ("recall", {"depths": [2.0]}),
        ("state_tracking", {"tasks": ["oddness"]}),
        ("state_tracking", {"letters": 1}),
        ("listops", {"symbols": [1]}),
        ("generation", {"new": 0}),
        ("speed", {"rounds": 0}),
        ("cost", {"context": [1]}),
    ],
)
def test_options_that_are_wrong(name: str, options: Mapping[str, Any]) -> None:
    with pytest.raises(UsageError):
        find(name).make(options)
