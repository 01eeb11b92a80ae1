"""The runner on ONNX Runtime gives the tokens of the torch module, whatever proposes them."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import reroll
import reroll.onnx
from reroll.cli.app import app
from reroll.errors import UsageError
from reroll.export.onnx import Onnx
from reroll.onnx.drafts import Borrowing, Keeping
from reroll.onnx.sampling import Sampling, draw, kept
from reroll.onnx.state import PIECE, State
from reroll.rewrite.ir.program import Program
from reroll.runtime.speculation.sampling import Sampling as TorchSampling
from tests import captured, tiny
from tests.tiny.types import build

IDS = np.random.default_rng(0).integers(3, 60, 20)
NEW = 30
DELTA = "linearize(mixer=gated_deltanet, window=4, sinks=1)"
SLOTS = "linearize(mixer=gsa, mixer_options={slots: 8}, gates=clustered, samples=2, window=4)"
WINDOW = "window(size=6, sinks=2)"


def tokens(text: str) -> list[int]:
    return [3 + ord(c) % 56 for c in text]


@cache
def program(name: str, passes: str = "") -> Program:
    built = captured.captured(name) if name in captured.MODELS else reroll.capture(build(name))
    return reroll.run_passes(built, passes, measure="off", tokenizer=tokens) if passes else built


@cache
def module(name: str, passes: str = "") -> Any:
    return program(name, passes).to_module()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runners of exports, each made once."""

    @cache
    def made(name: str, passes: str, draft: str = "", **options: Any) -> reroll.onnx.Runner:
        whole = program(name, passes)
        if draft:
            whole = whole.with_draft(whole.twin(draft, tokenizer=tokens))
        directory = tmp_path_factory.mktemp("onnx")
        Onnx(graphs=("unrolled",), **options).write(whole, directory)
        return reroll.onnx.load(directory, threads=1)

    return made


def greedy(name: str, passes: str = "", ids: np.ndarray = IDS, new: int = NEW) -> np.ndarray:
    given = torch.from_numpy(np.array(ids))[None]
    options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = module(name, passes).generate(given, attention_mask=torch.ones_like(given), **options)
    return found[0].numpy()  # type: ignore[no-any-return]


CASES = [
    ("llama", "", WINDOW),
    ("llama", "", DELTA),
    ("llama", "", "tie(blocks=2), relax(rank=2)"),
    ("llama", "", "window(size=6, sinks=2, layers=[1, 3])"),
    ("llama", WINDOW, "tie(blocks=2)"),
    ("llama", DELTA, "tie(blocks=2)"),
    ("llama", SLOTS, "tie(blocks=2)"),
    ("gemma3", "", WINDOW),
    ("gpt2", "", WINDOW),
    ("lfm2", "", WINDOW),
    pytest.param("qwen3_next", "", WINDOW, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("runtime", ["any", "ort"])
@pytest.mark.parametrize(("name", "passes", "draft"), CASES)
def test_tokens_are_those_of_the_module(
    name: str, passes: str, draft: str, runtime: str, exported: Any
) -> None:
    runner = exported(name, passes, draft, runtime=runtime)
    expected = greedy(name, passes)
    for each, count in ((None, None), ("draft", 4), ("lookup", 3), ("auto", None)):
        found = runner.generate(IDS, NEW, each, draft_tokens=count, ends=())
        assert np.array_equal(found, expected), each
        if each == "draft":
            assert runner.report.drafts["draft"][0] > 0


@pytest.mark.parametrize("runtime", ["any", "ort"])
@pytest.mark.parametrize("passes", ["", DELTA])
def test_two_sequences_share_a_session(passes: str, runtime: str, exported: Any) -> None:
    """One after the other, and in turns of a few tokens, with a draft that keeps a state."""
    runner = exported("llama", passes, "tie(blocks=2)", runtime=runtime)
    rows = [IDS, np.random.default_rng(1).integers(3, 60, 13)]
    expected = [greedy("llama", passes, row) for row in rows]
    for row, wanted in zip(rows, expected, strict=True):
        assert np.array_equal(runner.generate(row, NEW, "draft", draft_tokens=4, ends=()), wanted)
    sequences, found = [runner.sequence() for _ in rows], list(rows)
    for _ in range(NEW // 5):
        for n, sequence in enumerate(sequences):
            found[n] = runner.generate(
                found[n], 5, "draft", draft_tokens=3, ends=(), sequence=sequence
            )
    for actual, wanted in zip(found, expected, strict=True):
        assert np.array_equal(actual, wanted)


@pytest.mark.parametrize("passes", ["", DELTA, WINDOW])
def test_a_conversation_goes_on(passes: str, exported: Any) -> None:
    runner = exported("llama", passes, "tie(blocks=2)")
    sequence = runner.sequence()
    first = runner.generate(IDS, 8, "draft", ends=(), sequence=sequence, draft_tokens=4)
    asked = np.concatenate([first, IDS[:6]])
    found = runner.generate(asked, 8, "draft", ends=(), sequence=sequence, draft_tokens=4)
    assert np.array_equal(found, greedy("llama", passes, asked, 8))
    with pytest.raises(UsageError, match="do not go on"):
        runner.generate(IDS[::-1], 8, sequence=sequence)


@pytest.mark.parametrize("runtime", ["any", "ort"])
@pytest.mark.parametrize("passes", ["", DELTA])
def test_a_beginning_is_read_once(passes: str, runtime: str, exported: Any) -> None:
    runner = exported("llama", passes, "tie(blocks=2)", runtime=runtime)
    common = runner.sequence()
    begun = runner.generate(IDS, 3, None, ends=(), sequence=common)
    for end in ([5, 9], [7], [5, 9]):
        asked = np.concatenate([begun, end])
        found = runner.generate(asked, 8, "draft", ends=(), sequence=common.copy())
        assert np.array_equal(found, greedy("llama", passes, asked, 8))


@pytest.mark.parametrize(
    ("passes", "draft", "kind"),
    [
        ("", WINDOW, Borrowing),
        ("", "window(size=6, layers=[1])", Borrowing),
        (WINDOW, "tie(blocks=2)", Borrowing),
        (DELTA, "tie(blocks=2)", Borrowing),
        ("", DELTA, Keeping),
    ],
)
def test_where_a_draft_has_its_state(passes: str, draft: str, kind: type, exported: Any) -> None:
    runner = exported("llama", passes, draft)
    sequence = runner.sequence()
    runner.generate(IDS, 4, "draft", ends=(), sequence=sequence)
    assert type(sequence.drafts["draft"]) is kind


@pytest.mark.parametrize("runtime", ["any", "ort"])
def test_a_draft_that_sees_everything_is_always_right(runtime: str, exported: Any) -> None:
    runner = exported("llama", "", "window(size=60, sinks=1)", runtime=runtime)
    runner.generate(IDS, NEW, "draft", draft_tokens=4, ends=())
    proposed, accepted = runner.report.drafts["draft"]
    assert proposed == accepted > 0


@pytest.mark.parametrize("passes", ["", DELTA, SLOTS, WINDOW])
@pytest.mark.parametrize("runtime", ["any", "ort"])
def test_a_state_goes_back(passes: str, runtime: str, exported: Any) -> None:
    """Wrong tokens leave nothing behind, for however many of them were right."""
    graph = exported("llama", passes, "tie(blocks=2)", runtime=runtime).graph
    row = [int(i) for i in IDS]
    state, fresh = State(graph), State(graph)
    state.extend(row[:10], 0)
    for right in (10, 11, 13):
        before = state.mark()
        state.extend([*row[state.read : right], 5, 6, 7], 1)
        state.back(before, right)
        assert state.read <= right
    actual = state.extend(row[state.read :], 1)
    expected = fresh.extend(row, 1)
    assert np.abs(actual - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("passes", ["", DELTA])
def test_several_tokens_behind_a_state_have_the_logits_of_one_by_one(
    passes: str, exported: Any
) -> None:
    graph = exported("llama", passes, "tie(blocks=2)").graph
    row = [int(i) for i in IDS]
    several, single = State(graph), State(graph)
    for state in (several, single):
        state.extend(row[:9], 0)
    actual = several.extend(row[9:], len(row) - 9)
    expected = np.concatenate([single.extend([token], 1) for token in row[9:]])
    assert np.abs(actual - expected).max() < 1e-5 * np.abs(expected).max()


def test_a_long_prompt_is_read_in_pieces(exported: Any) -> None:
    runner = exported("llama", "", WINDOW)
    row = np.random.default_rng(2).integers(3, 60, 2 * PIECE + 7)
    for draft in (None, "draft"):
        found = runner.generate(row, 5, draft, ends=())
        assert np.array_equal(found, greedy("llama", "", row, 5))


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_other_precisions(precision: str, exported: Any) -> None:
    """A draft does not change what the model writes; the models are compared by `--check`."""
    runner = exported("llama", "", WINDOW, precision=precision)
    plain = runner.generate(IDS, NEW, None, ends=())
    assert np.array_equal(runner.generate(IDS, NEW, "draft", draft_tokens=4, ends=()), plain)


def test_weights_are_in_the_file_once(exported: Any) -> None:
    alone, both = (exported("llama", "", draft) for draft in ("", WINDOW))
    sizes = [runner.manifest["weights"]["bytes"] for runner in (alone, both)]
    assert sizes[0] == sizes[1]
    added = exported("llama", "", DELTA)
    entries = added.manifest["weights"]["sha256"]
    own = [name for name in entries if name.startswith("draft-")]
    assert own
    assert all("mixer" in name for name in own)


def test_it_ends_where_the_model_does(exported: Any) -> None:
    runner = exported("llama", "", WINDOW)
    assert runner.ends == {2}
    whole = greedy("llama")
    end = int(whole[-10])
    place = whole[len(IDS) :].tolist().index(end)
    sequence = runner.sequence()
    found = runner.generate(IDS, NEW, "draft", draft_tokens=8, ends={end}, sequence=sequence)
    assert np.array_equal(found, whole[: len(IDS) + place + 1])
    assert sequence.state.read == len(found) - 1
    assert runner.generate(IDS[None], 3, ends=()).shape == (1, len(IDS) + 3)


class TestSampling:
    def test_distributions_are_those_of_the_torch_side(self) -> None:
        logits = np.random.default_rng(0).normal(size=(5, 40)).astype(np.float32) * 3
        for options in ((1.0, 0, 1.0), (0.7, 10, 1.0), (1.5, 0, 0.8), (0.7, 20, 0.6), (None,)):
            expected = TorchSampling(*options).distribution(torch.from_numpy(logits)).numpy()
            assert np.abs(Sampling(*options).distribution(logits) - expected).max() < 1e-6

    @pytest.mark.parametrize("drawn", [True, False])
    def test_tokens_have_the_model_s_distribution(self, drawn: bool) -> None:
        random = np.random.default_rng(0)
        p, q = random.random((3, 6)) ** 2, random.random((2, 6)) ** 2
        p[0, 2] = 0.0
        p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
        counts, rounds = np.zeros((3, 6)), 20_000
        for _ in range(rounds):
            proposed = [draw(row, random) for row in q] if drawn else [1, 3]
            for place, token in enumerate(kept(proposed, q if drawn else None, p, random)):
                counts[place, token] += 1
        for found, wanted in zip(counts, p, strict=True):
            total = found.sum()
            deviation = np.sqrt(wanted * (1 - wanted) * total)
            assert (np.abs(found - wanted * total) <= 4.5 * deviation + 1e-6).all()
        common = np.minimum(p[0], q[0]).sum() if drawn else p[0, 1]
        assert abs(counts[1].sum() / rounds - common) < 0.015

    @pytest.mark.parametrize("draft", ["draft", "lookup", "auto"])
    def test_it_samples(self, draft: str, exported: Any) -> None:
        runner = exported("llama", "", "window(size=60, sinks=1)")
        warm = {"temperature": 2.0, "top_k": 30, "top_p": 0.95, "draft_tokens": 3, "ends": ()}
        first, again, other = (
            runner.generate(IDS, NEW, draft, seed=seed, **warm) for seed in (1, 1, 2)
        )
        assert np.array_equal(first, again)
        assert not np.array_equal(first, other)
        if draft == "draft":
            proposed, accepted = runner.report.drafts["draft"]
            assert accepted >= 0.98 * proposed
        coldest = runner.generate(IDS, NEW, draft, seed=1, ends=(), temperature=2.0, top_k=1)
        assert np.array_equal(coldest, greedy("llama"))


class TestRefused:
    def test_what_is_no_export(self, tmp_path: Path) -> None:
        for place in (tmp_path, tmp_path / "nothing"):
            with pytest.raises(UsageError, match="no directory that reroll exported") as told:
                reroll.onnx.load(place)
            assert "reroll export" in str(told.value.hint)

    def test_a_model_without_state(self, tmp_path: Path) -> None:
        Onnx().write(program("bert"), tmp_path)
        with pytest.raises(UsageError, match="does not decode behind a state"):
            reroll.onnx.load(tmp_path)

    def test_a_graph_that_is_not_there(self, exported: Any) -> None:
        directory = exported("llama", "").directory
        with pytest.raises(UsageError, match="no graph loop"):
            reroll.onnx.load(directory, graph="loop")

    def test_what_generate_is_given(self, exported: Any) -> None:
        runner = exported("llama", "")
        for ids, told in (
            (np.stack([IDS, IDS]), "one row"),
            (np.array([], np.int64), "one row"),
            (IDS.astype(np.float32), "integers"),
            (np.array([3, 99]), "no token 99"),
            (np.array([3, -1]), "no token -1"),
        ):
            with pytest.raises(UsageError, match=told):
                runner.generate(ids)
        for draft, told in (("draft", "no draft was exported"), ("windw", "no draft 'windw'")):
            with pytest.raises(UsageError, match=told) as error:
                runner.generate(IDS, draft=draft)
            assert error.value.hint
        for options in ({"temperature": -1}, {"top_p": 2.0}, {"draft_tokens": 0}):
            with pytest.raises(UsageError):
                runner.generate(IDS, **options)
        with pytest.raises(UsageError, match="another runner"):
            runner.generate(IDS, sequence=exported("llama", "", WINDOW).sequence())

    def test_more_tokens_than_positions(self, exported: Any) -> None:
        runner = exported("gpt2", "", WINDOW)
        limit = runner.manifest["positions"]
        with pytest.raises(UsageError, match="positions"):
            runner.generate(IDS, limit)


_ALONE = """
import json, sys
import reroll.onnx
runner = reroll.onnx.load(sys.argv[1])
found = runner.generate(json.loads(sys.argv[2]), 6, "auto", ends=())
assert not {"torch", "transformers", "onnx"} & set(sys.modules)
print(json.dumps(found.tolist()))
"""


def test_it_needs_neither_torch_nor_transformers(exported: Any) -> None:
    directory = str(exported("llama", "", WINDOW).directory)
    run = [sys.executable, "-c", _ALONE, directory, json.dumps(IDS.tolist())]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == greedy("llama", "", IDS, 6).tolist()


def test_from_the_command_line(tmp_path: Path) -> None:
    model = str(tiny.save(tiny.llama(), tmp_path / "model", tiny.tokenizer()))
    out, onnx = str(tmp_path / "out"), str(tmp_path / "onnx")

    def run(*words: str) -> Any:
        result = CliRunner().invoke(app, list(words))
        assert result.exit_code == 0, result.output
        return result

    run("convert", model, out, "--draft", "window(size=64, sinks=2)")
    run("export", out, onnx, "--graphs", "unrolled", "--check")
    options = ["--prompt", "a b a b a b", "--max-new-tokens", "12", "--json"]
    texts = []
    for where, speculate in ((out, []), (onnx, []), (onnx, ["--speculate", "draft"])):
        told = json.loads(run("generate", where, *speculate, *options).stdout)
        texts.append(told["outputs"][0]["text"])
    assert texts[0] == texts[1] == texts[2]
    assert told["speculation"]["drafts"]["draft"]["proposed"] > 0
    assert "reads the same weights" in (tmp_path / "onnx" / "README.md").read_text()
    for words in (
        ["--beams", "2"],
        ["--save-state", str(tmp_path / "s")],
        ["--dtype", "float32"],
        ["--exact"],
    ):
        result = CliRunner().invoke(app, ["generate", onnx, *options, *words])
        assert result.exit_code != 0
        assert "exported" in result.output
