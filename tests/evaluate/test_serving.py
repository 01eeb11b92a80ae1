from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from reroll.cli.app import app
from reroll.errors import UsageError
from reroll.evaluate.serving import compare_serving
from reroll.rewrite.capture import capture
from reroll.rewrite.pipeline.manager import run_passes
from tests import tiny
from tests.captured import captured

pytestmark = pytest.mark.usefixtures("captured_once")

PROMPTS = [[5, 9, 3], [17, 4, 4, 30, 8], [40], [22, 23, 24, 25]]


def test_all_sides_answer_the_same_requests():
    passes = "tie(blocks=2), insert_exits(at=[2], threshold=0.012)"
    model = run_passes(captured("llama"), passes, measure=False).to_module()
    found = compare_serving(model, PROMPTS, slots=2, tokens=6, rounds=2)
    assert list(found["sides"]) == ["full", "lockstep", "compaction", "depth"]
    assert found["sides"]["full"]["depth"] == {"mean": 4.0, "histogram": {4: 20}}
    assert found["sides"]["lockstep"]["of_lockstep"] == 1.0
    early = found["sides"]["depth"]
    assert early["depth"] == found["sides"]["lockstep"]["depth"]
    assert early["depth"]["mean"] < 4
    assert len(early["seconds"]) == 2
    assert 1 <= early["rows_per_batch"] <= 2


def test_a_model_that_nobody_leaves_early_is_refused():
    for passes in ("tie(blocks=2)", "insert_exits(at=[2])"):
        model = run_passes(captured("llama"), passes, measure=False).to_module()
        with pytest.raises(UsageError, match="nobody leaves"):
            compare_serving(model, PROMPTS)


def test_the_commands_say_how_deep_tokens_went(tmp_path):
    tiny.save(tiny.llama(), tmp_path / "model", tiny.tokenizer())
    passes = "insert_exits(at=[2], criterion=latent, threshold=-0.6)"
    program = run_passes(capture(str(tmp_path / "model")), passes, measure=False)
    program.save(str(tmp_path / "out"))
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60, encoding="utf-8")
    options = ["--text", str(text), "--slots", "2", "--prompt-tokens", "4", "--rounds", "1"]
    runner = CliRunner()
    result = runner.invoke(app, ["serve-bench", str(tmp_path / "out"), *options, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["requests"] == 4
    assert sum(found["sides"]["depth"]["depth"]["histogram"].values()) == 4 * 31
    shown = runner.invoke(app, ["serve-bench", str(tmp_path / "out"), *options])
    assert "trips per token" in shown.output
    options = ["--prompt", "the quick", "--max-new-tokens", "5"]
    for _ in range(2):
        result = runner.invoke(app, ["generate", str(tmp_path / "out"), *options, "--json"])
        found = json.loads(result.stdout)
        # of this call alone
        assert sum(found["depth"]["histogram"].values()) == found["steps"]
