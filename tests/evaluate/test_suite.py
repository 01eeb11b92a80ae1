"""Suites: what they report, in which forms, and that one measure does not stop the others."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import reroll
from reroll.cli import app
from reroll.errors import RerollError, UsageError
from reroll.evaluate import harness, plots, report, suite
from reroll.evaluate.answers import Question, ScoredRow, Spot, encode, score_rows
from reroll.evaluate.measure import Bench, Measure, measures
from reroll.evaluate.runner import Runner
from reroll.evaluate.subjects import open_subject
from tests import tiny

pytestmark = pytest.mark.usefixtures("captured_once")

TEXT = (
    "perplexity(contexts=[32, 64], tokens=512), agreement(contexts=[64], tokens=256), cost, "
    "generation(prompts=2, prompt=8, new=8), speed(contexts=[16, 32], decode=1, rounds=1), "
    "recall(lengths=[120, 160], depths=[0, 1], pairs=[4], entries=[4], samples=1), "
    "state_tracking(lengths=[2, 4], samples=2, shots=1), copying(lengths=[20], passages=1), "
    "listops(symbols=[16], samples=2, shots=1)"
)
DOCS = Path(__file__).parents[2] / "docs" / "cli.md"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("made") / "model"
    return tiny.save(tiny.llama(), made, tiny.tokenizer(prefix=True))


@pytest.fixture(scope="module")
def out(original: Path) -> Path:
    made = reroll.capture(str(original))
    near = reroll.run_passes(made, "tie(blocks=2), window(size=16)", measure=True)
    near.save(str(original.with_name("out")))
    return original.with_name("out")


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


@pytest.fixture(scope="module")
def page(original: Path) -> Path:
    return original.with_name("page.html")


@pytest.fixture(scope="module")
def found(original: Path, out: Path, page: Path) -> Any:
    result = invoke(
        out, "--against", original, "--measures", TEXT, "--html", page, "--seed", 3, "--json"
    )
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_every_measure_runs_on_both_sides(found: Any) -> None:
    assert list(found["measures"]) != sorted(found["measures"])  # in the order that was asked for
    assert set(found["measures"]) == set(measures())
    for name, each in found["measures"].items():
        assert each["status"] == "done", (name, each)
        assert "model" in each["result"], name
        assert each["headline"]["model"], name
    assert found["measures"]["recall"]["result"]["window"] == 16
    assert found["measures"]["recall"]["options"]["samples"] == 1
    assert [p["pass"].partition("(")[0] for p in found["passes"]] == ["tie", "window"]
    assert found["seed"] == 3


def test_the_same_seed_gives_the_same_and_another_one_does_not(original: Path, out: Path) -> None:
    chosen = suite.choose("recall(tasks=[mqar], pairs=[4], samples=2)", "quick")
    results = []
    for seed in (3, 3, 4):
        made = suite.evaluate(str(out), None, chosen, seed=seed)
        results.append(made["measures"]["recall"]["result"]["model"])
    assert results[0] == results[1] != results[2]


def keys(value: Any) -> Iterator[str]:
    """All keys of JSON data but those that name what was measured, or come from passes."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            if key not in ("headline", "passes", "options"):
                yield from keys(item)
    elif isinstance(value, list):
        for item in value:
            yield from keys(item)


def test_all_keys_are_documented(found: Any) -> None:
    text = DOCS.read_text(encoding="utf-8").partition("## evaluate")[2].partition("\n## ")[0]
    documented = set(re.findall(r"`([a-z0-9_]+)`", text))
    missing = {key for key in keys(found) if not key.isdigit()} - documented
    assert not missing


def test_the_page_needs_nothing_else(found: Any, page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for forbidden in ("<script", "<link", "<img", "@import", " src=", "<iframe"):
        assert forbidden not in text, forbidden
    # links go to the page itself; the other addresses are names of XML
    assert all(m.startswith("#") for m in re.findall(r'href="([^"]*)"', text))
    assert all(m.startswith("#") for m in re.findall(r"url\(([^)]*)\)", text))
    assert text.count("<svg") == text.count("</svg>") >= 6
    # what was measured at one place only is written
    assert re.search(r"<td>listops</td><td>original</td>", text)
    for words in ("Perplexity over the context", "depth x length", "pass by pass", "needle, model"):
        assert words in text, words
    assert "tie(blocks=2)" in text


def test_the_table_shows_both_sides(original: Path, out: Path) -> None:
    result = invoke(out, "--against", original, "--measures", "cost(contexts=[64])")
    assert result.exit_code == 0, result.stderr
    assert "original" in result.stdout
    line = next(x for x in result.stdout.splitlines() if "parameters" in x)
    counts = [int(x.replace(",", "")) for x in re.findall(r"\b\d[\d,]+\b", line)]
    assert counts[0] < counts[1]


class Broken(Measure):
    """Fails."""

    name = "broken"

    def run(self, bench: Bench) -> dict[str, Any]:
        raise RuntimeError("the model fell over\nin two lines")

    def headline(self, found: Any) -> dict[str, float | int | None]:
        return {}


def test_a_measure_that_fails_does_not_end_the_others(out: Path) -> None:
    chosen = (Broken(), *suite.choose("agreement, cost", "quick"))
    done = suite.evaluate(str(out), None, chosen)["measures"]
    assert done["broken"]["status"] == "failed"
    assert done["broken"]["error"] == "RuntimeError: the model fell over"
    assert done["agreement"]["status"] == "skipped"
    assert "--against" in done["agreement"]["reason"]
    assert done["cost"]["status"] == "done"


def test_an_interrupt_keeps_what_was_measured(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from reroll.evaluate.measures.agreement import Agreement

    def stop(self: Agreement, bench: Bench) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(Agreement, "run", stop)
    result = invoke(out, "--measures", "cost, agreement, speed", "--json")
    assert result.exit_code == 130
    done = json.loads(result.stdout)
    assert done["interrupted"] is True
    assert list(done["measures"]) == ["cost"]


def test_a_failed_measure_is_seen_in_the_exit_status(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reroll.evaluate.measures.cost import Cost

    def fail(self: Cost, bench: Bench) -> dict[str, Any]:
        raise RerollError("no way", hint="another way")

    monkeypatch.setattr(Cost, "run", fail)
    result = invoke(out, "--measures", "cost")
    assert result.exit_code == 1
    assert "cost failed: no way" in result.stdout


@pytest.mark.slow
def test_a_side_without_a_tokenizer_takes_the_others(original: Path) -> None:
    chosen = suite.choose("perplexity(contexts=[32], tokens=64)", "quick")
    done = suite.evaluate(tiny.llama(), str(original), chosen)["measures"]["perplexity"]
    assert done["status"] == "done", done
    assert done["result"]["model"] == done["result"]["original"]
    alone = suite.evaluate(tiny.llama(), None, chosen)["measures"]["perplexity"]
    assert alone["reason"] == "LlamaForCausalLM has no tokenizer"


def test_a_model_without_text_says_what_does_not_apply() -> None:
    done = suite.evaluate(tiny.vit(), None)["measures"]
    assert done["cost"]["status"] == "done"
    others = {name: each for name, each in done.items() if name != "cost"}
    assert {each["status"] for each in others.values()} == {"skipped"}
    assert all(each["reason"] for each in others.values())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--measures", "perplexty"], "did you mean perplexity?"),
        (["--measures", "recall(sample=1)"], "did you mean samples?"),
        (["--measures", "recall(samples=many)"], "an integer"),
        (["--measures", ""], "no measure"),
        (["--suite", "huge"], "quick or full"),
        (["--html", "/nowhere/page.html"], "no such directory"),
        (["--attention", "none"], "'eager'"),
    ],
)
def test_what_is_refused_before_a_model_is_opened(arguments: list[str], words: str) -> None:
    result = invoke("no-such-model", *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stdout == ""


def test_without_matplotlib_there_is_no_page_but_everything_else(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    refused = invoke(out, "--measures", "cost", "--html", tmp_path / "page.html")
    assert refused.exit_code == 2
    assert "reroll[plots]" in refused.stderr
    assert invoke(out, "--measures", "cost").exit_code == 0


def test_a_page_that_cannot_be_drawn_leaves_nothing(
    found: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "page.html"
    path.write_text("before")
    monkeypatch.setattr(report, "page", lambda found: "x" * 100)
    monkeypatch.setattr(Path, "replace", lambda self, other: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report.write_page(found, path)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


# ---- lm-eval


def test_lm_eval_that_is_not_installed(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="not installed"):
        harness.check_tasks("hellaswag")
    with pytest.raises(UsageError, match="no task"):
        harness.check_tasks(" , ")


TASK = """\
task: count_to_three
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: label
doc_to_choice: choices
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with a task of lm-eval's whose data needs no network."""
    pytest.importorskip("lm_eval", reason="pip install -c constraints.txt lm-eval")
    data = tmp_path / "data.json"
    rows = [
        {"question": f"{'one ' * n}two", "choices": [" three", " four", " five"], "label": n % 3}
        for n in range(1, 5)
    ]
    data.write_text("\n".join(map(json.dumps, rows)))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "task.yaml").write_text(TASK.format(data=data))
    return folder


@pytest.mark.slow
def test_lm_eval_runs_on_a_saved_model(original: Path, out: Path, tasks: Path) -> None:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    for path in (original, out):
        subject = open_subject(str(path))
        found = harness.harness(subject, ["count_to_three"], manager=manager)
        expected = 0.0
        for row in map(json.loads, (tasks.parent / "data.json").read_text().splitlines()):
            questions = [encode(Runner(subject), row["question"], row["choices"], row["label"])]
            whole = [
                sum(s.log_likelihood for s in seen)
                for seen in score_rows(Runner(subject), _rows_of(questions[0]))
            ]
            expected += max(range(3), key=whole.__getitem__) == row["label"]
        assert found["count_to_three"]["acc"] == expected / 4
    with pytest.raises(UsageError, match="no task"):
        harness.harness(subject, ["count_to_ten"], manager=manager)


@pytest.mark.slow
def test_the_command_of_lm_eval_loads_a_saved_model(out: Path, tasks: Path) -> None:
    arguments = ["--model", "hf", "--model_args", f"pretrained={out}", "--device", "cpu"]
    arguments += ["--tasks", "count_to_three", "--include_path", str(tasks)]
    done = subprocess.run(
        [sys.executable, "-m", "reroll.cli.lm_eval", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "count_to_three" in done.stdout


def _rows_of(question: Question) -> list[ScoredRow]:
    """A row for each candidate, every token of which is looked at."""
    rows = []
    for candidate in question.candidates:
        ids = question.prompt + candidate
        start = len(question.prompt)
        rows.append(ScoredRow(ids, [Spot(p - 1, ids[p]) for p in range(start, len(ids))]))
    return rows
