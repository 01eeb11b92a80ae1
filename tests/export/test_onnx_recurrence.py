from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.ops import op_loop

import reroll
from reroll.errors import ExportError
from reroll.export.onnx import Onnx
from reroll.export.onnx.check import prompts
from reroll.export.onnx.session import Session
from reroll.rewrite.passes import tolerances
from reroll.rewrite.program import Program
from reroll.rewrite.weights import full
from tests.captured import captured

MIXERS = (
    "linear", "retention", "gla", "mamba2", "hgrn2", "deltanet", "gated_deltanet", "kda", "rwkv6",
)  # fmt: skip


def linearized(options: str) -> Program:
    """A llama with mixers that are heard: their gains start at zero beside a window."""
    program = reroll.run_passes(captured("llama"), f"linearize({options})", measure=False)
    changed = {
        name: replace(weight, entries=tuple(_gains(weight)))
        for name, weight in program.weights.items()
        if name.endswith("mixer.gain")
    }
    assert changed
    return program.with_weights(program.weights.with_weights(changed))


def _gains(weight):
    for place in range(len(weight.entries)):
        yield full(weight.meta.shape, 0.7 + 0.1 * place, torch.float32)


def exported(program: Program, directory, **options) -> dict:
    return Onnx(check=True, **options).write(program, directory)


@pytest.mark.parametrize("mixer", MIXERS)
def test_mixers(mixer, tmp_path):
    found = exported(linearized(f"mixer={mixer}, window=0, sinks=0"), tmp_path)
    for graph in found["graphs"].values():
        assert graph["check"]["relative_rms_error"] < 1e-5
    assert {s["part"] for s in found["states"]} == {"recurrent_state"}
    assert not any(s["grows"] for s in found["states"])


@pytest.mark.parametrize(
    "options",
    [
        "mixer=gla, window=6, sinks=2",
        "mixer=gated_deltanet, window=8, sinks=0",
        # two layers keep their attention
        "mixer=linear, window=6, sinks=3, layers=[1, 2]",
    ],
)
def test_beside_a_window(options, tmp_path):
    found = exported(linearized(options), tmp_path)
    for graph in found["graphs"].values():
        assert graph["check"]["relative_rms_error"] < 1e-5
    parts = {s["part"]: s for s in found["states"] if not s["grows"]}
    assert {"recurrent_state", "waiting", "key", "value"} <= set(parts)
    window = parts["waiting"]["shape"][2]
    assert parts["key"]["shape"][2] == window - 1
    grows = [s for s in found["states"] if s["grows"]]
    assert bool(grows) == ("layers" in options)


@pytest.mark.parametrize("options", ["size=8, sinks=2", "size=5"])
def test_windows(options, tmp_path):
    program = reroll.run_passes(captured("llama"), f"window({options})", measure=False)
    exported(program, tmp_path)


def test_a_prompt_in_pieces(tmp_path):
    program = linearized("mixer=gla, window=6, sinks=2")
    exported(program, tmp_path, graphs=("loop",))
    session = Session(tmp_path / "loop.onnx")
    ids, seen = prompts(program)
    positions = (seen.cumsum(-1) - 1).clamp(min=0)
    results = []
    for sizes in ([24], [2, 1, 9, 12]):
        session.reset(len(ids))
        at, logits = 0, []
        for size in sizes:
            end = at + size
            given = {
                "input_ids": ids[:, at:end],
                "attention_mask": seen[:, :end],
                "position_ids": positions[:, at:end],
            }
            logits.append(session.run(given)["logits"])
            at = end
        results.append(torch.cat(logits, 1)[seen.bool()])
    assert tolerances.relative_rms(*results) < 1e-5


@pytest.mark.parametrize("opset", [23, 27])
def test_what_has_no_kernel_runs_the_definition(opset, tmp_path, monkeypatch):
    # it joins what a Loop scans, where the specification stacks it
    monkeypatch.setattr(op_loop.np, "vstack", np.stack)
    program = linearized("mixer=gated_deltanet, window=0, sinks=0")
    Onnx(graphs=("loop",), opset=opset).write(program, tmp_path)
    path = tmp_path / "loop.onnx"
    model = onnx.load(path, load_external_data=False)
    onnx.checker.check_model(str(path), full_check=True)
    names = [f.name for f in model.functions]
    assert names == (["LinearAttention"] if opset < 27 else [])
    evaluator = ReferenceEvaluator(str(path))
    ids, seen = prompts(program, rows=2, length=6)
    given = {
        "input_ids": ids.numpy(),
        "attention_mask": seen.numpy(),
        "position_ids": (seen.cumsum(-1) - 1).clamp(min=0).numpy(),
    }
    for item in model.graph.input:
        if item.name.startswith("past_key_values"):
            dims = [d.dim_value or 2 for d in item.type.tensor_type.shape.dim]
            given[item.name] = np.zeros(dims, np.float32)
    actual = torch.from_numpy(np.array(evaluator.run(["logits"], given)[0]))
    with torch.no_grad():
        expected = program.to_module()(ids, attention_mask=seen).logits
    shown = seen.bool()
    assert tolerances.relative_rms(actual[shown], expected[shown]) < 1e-5


def test_a_mixer_without_a_construction_is_named(tmp_path):
    with pytest.raises(ExportError, match="mlstm has no lowering") as error:
        exported(linearized("mixer=mlstm, window=0, sinks=0"), tmp_path)
    assert "recurrence:mlstm" in error.value.hint
