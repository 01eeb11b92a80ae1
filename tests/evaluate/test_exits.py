from __future__ import annotations

import json
import math

import pytest
import torch
from typer.testing import CliRunner

from reroll.cli.app import app
from reroll.errors import UsageError
from reroll.evaluate.classifiers import fit_exits
from reroll.evaluate.exits import calibrate, p_value
from reroll.rewrite.ir.exits import exit_loop
from reroll.rewrite.pipeline.manager import run_passes
from tests import tiny
from tests.captured import captured

pytestmark = pytest.mark.usefixtures("captured_once")

TOKENS = torch.randint(3, 64, (2048,), generator=torch.Generator().manual_seed(0))


def exiting(options: str):
    return run_passes(captured("llama"), f"insert_exits({options})", measure=False)


@pytest.mark.parametrize(("errors", "count", "risk"), [(0, 100, 0.05), (3, 200, 0.05)])
def test_the_p_value_bounds_the_chance_of_so_few_errors(errors, count, risk):
    tail = sum(math.comb(count, k) * risk**k * (1 - risk) ** (count - k) for k in range(errors + 1))
    assert tail <= p_value(errors, count, risk) <= math.e * tail + 1e-12


def test_p_values_fall_with_evidence():
    values = [p_value(round(0.02 * n), n, 0.05) for n in (100, 400, 1600)]
    assert values == sorted(values, reverse=True)
    assert p_value(5, 100, 0.05) == 1.0


@pytest.mark.parametrize("criterion", ["margin", "latent"])
def test_the_thresholds_keep_the_risk(criterion):
    program = exiting(f"at=[2, 3], criterion={criterion}")
    levels = (0.99, 0.9, 0.7, 0.5, 0.2)
    loose, found = calibrate(program, TOKENS, risk=0.6, levels=levels)
    assert found.tokens == 6 * 256
    assert set(found.thresholds) == {2, 3}
    assert found.observed < 0.6
    assert found.depth < 4
    # run again on the same rows, in one forward: what was counted is what happens
    rows = TOKENS[512:].reshape(6, 256)
    with torch.no_grad():
        full = captured("llama").to_module()(rows, use_cache=False).logits.argmax(-1)
        out = loose.to_module()(rows, use_cache=False)
    assert (out.logits.argmax(-1) != full).float().mean().item() == pytest.approx(found.observed)
    assert out.depth.float().mean().item() == pytest.approx(found.depth)
    assert "calibrate(risk=0.6" in loose.origin.steps[-1].text
    _, strict = calibrate(program, TOKENS, risk=0.05, levels=levels)
    assert strict.depth >= found.depth
    # the thresholds before are not touched
    assert all(math.isinf(t) for t in exit_loop(program)[1].thresholds)


def test_where_nothing_is_safe_nobody_leaves():
    program = exiting("at=[1], criterion=saturation")
    result, found = calibrate(program, TOKENS, risk=0.0001)
    assert found.thresholds is None
    assert found.depth == 4
    assert all(math.isinf(t) for t in exit_loop(result)[1].thresholds)
    assert len(found.tried) == 1


@pytest.mark.parametrize("criterion", ["linear", "mlp", "gated"])
def test_classifiers_learn_from_cached_states(criterion):
    # after the last exit, trips remain
    program = exiting(f"at=[1, 2], criterion={criterion}")
    model = program.to_module()
    rows = TOKENS[:512].reshape(2, 256)
    steps = 100 if criterion == "gated" else 400
    accuracy = fit_exits(model, TOKENS[:512], steps=steps, decay=0.0)
    with torch.no_grad():
        out = model(rows, output_hidden_states=True, use_cache=False)
        last = out.logits.argmax(-1)
    assert set(accuracy) == {1, 2}
    # better than the more frequent answer, on what it was fitted to
    labels = {t: agreement(model, out.hidden_states[t], last) for t in (1, 2)}
    for trips, agree in labels.items():
        assert accuracy[trips] > max(agree, 1 - agree)
    # each exit on its own
    one, two = (model.get_parameter(f"model.layers.{n}.exit.score.weight") for n in (0, 1))
    assert not torch.equal(one, two)
    # and what was learned is in the program
    stored, found = calibrate(model.to_program(), TOKENS, risk=0.5, levels=(0.9, 0.5))
    assert found.depth < 4
    assert len(stored.weights["model.layers.*.exit.score.weight"].entries) == 2


def agreement(model, hidden, last):
    norm = model.get_submodule("model.norm")
    states = torch.nn.functional.rms_norm(hidden, hidden.shape[-1:], norm.weight, 1e-6)
    return (model.lm_head(states).argmax(-1) == last).float().mean().item()


def test_what_cannot_be_calibrated_or_fitted():
    with pytest.raises(UsageError, match="no exits"):
        calibrate(captured("llama"), TOKENS)
    with pytest.raises(UsageError, match="too few"):
        calibrate(exiting("at=[1]"), TOKENS[:300])
    with pytest.raises(UsageError, match="no classifiers"):
        fit_exits(exiting("at=[1]").to_module(), TOKENS[:300])
    with pytest.raises(UsageError, match="open"):
        fit_exits(exiting("at=[1], criterion=linear, threshold=0.5").to_module(), TOKENS[:300])


def test_the_command_writes_thresholds_into_the_model(tmp_path):
    tiny.save(tiny.llama(), tmp_path / "model", tiny.tokenizer())
    from reroll.rewrite.capture import capture

    program = run_passes(
        capture(str(tmp_path / "model")), "insert_exits(at=[2], criterion=latent)", measure=False
    )
    program.save(str(tmp_path / "out"))
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 200, encoding="utf-8")
    options = ["calibrate", str(tmp_path / "out"), "--text", str(text), "--risk", "0.9", "--json"]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["depth"] <= 4
    loaded = capture(str(tmp_path / "out"))
    (threshold,) = [t for t in exit_loop(loaded)[1].thresholds if not math.isinf(t)]
    assert threshold == pytest.approx(found["thresholds"]["2"])
