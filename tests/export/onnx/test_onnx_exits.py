from __future__ import annotations

import onnx
import pytest
import torch

import reroll
from reroll.export.onnx import Onnx
from reroll.export.onnx.emit.check import prompts
from reroll.export.onnx.emit.session import Session
from reroll.export.onnx.graph import nodes_of
from reroll.rewrite.ir.program import Program
from tests.captured import captured
from tests.export.onnx.prompted import inputs


def with_exits(options: str, blocks: int | None = None) -> Program:
    passes = f"insert_exits({options})"
    if blocks is not None:
        passes = f"tie(blocks={blocks}), {passes}"
    return reroll.run_passes(captured("llama"), passes, measure=False)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("options", "blocks", "skips"),
    [
        ("at=[1, 2, 3], criterion=latent, threshold=-0.6", None, 1),
        ("at=[1, 2, 3], criterion=margin, threshold=0.05", 1, 1),
        ("at=[1, 2, 3], criterion=patience, threshold=1", None, 1),
        pytest.param("at=[1, 3], criterion=entropy, threshold=0.02", None, 2, marks=SLOW),
        pytest.param("at=[1, 2, 3], criterion=saturation, threshold=0.9", 1, 1, marks=SLOW),
        pytest.param("at=[2], criterion=mlp, threshold=0.4", None, 1, marks=SLOW),
        ("at=[1, 2, 3], criterion=latent, threshold=-0.6, state=skip", None, 1),
        pytest.param("at=[1, 2, 3], criterion=margin, threshold=0.05, head=own", 1, 1, marks=SLOW),
        # the classifier has a state, which every trip updates
        ("at=[1, 3], criterion=gated, threshold=0.4", None, 0),
        # caches as if nobody left: every trip runs
        ("at=[1, 2, 3], criterion=latent, threshold=-0.6, state=defer", None, 0),
    ],
)
def test_tokens_leave_after_the_same_trips(options, blocks, skips, tmp_path):
    program = with_exits(options, blocks)
    # the check compares the depth of every token as well
    found = Onnx(check=True).write(program, tmp_path)
    for graph in found["graphs"].values():
        assert graph["check"]["relative_rms_error"] < 1e-5
        assert "depth" in {o["name"] for o in graph["outputs"]}
    model = onnx.load(tmp_path / "loop.onnx", load_external_data=False)
    kinds = [n.op_type for n in nodes_of(model.graph)]
    # a loop of two trips before the last exit, or one of three
    assert (kinds.count("If") > 0) == (skips > 0)
    unrolled = onnx.load(tmp_path / "unrolled.onnx", load_external_data=False)
    assert not {"If", "Loop"} & {n.op_type for n in nodes_of(unrolled.graph)}


@pytest.mark.parametrize("kind", ["loop", "unrolled"])
def test_thresholds_are_an_input_with_a_default(kind, tmp_path):
    program = with_exits("at=[1, 2, 3], criterion=latent, threshold=-0.6")
    Onnx(graphs=(kind,)).write(program, tmp_path)
    session = Session(tmp_path / f"{kind}.onnx")
    assert "exit_thresholds" not in session.inputs
    ids, seen = prompts(program)
    given = inputs(ids, seen)
    depths = {}
    for threshold in (None, -1e9, 1e9):
        session.reset(len(ids))
        feed = {n: v.numpy() for n, v in given.items()} | session.state
        if threshold is not None:
            feed["exit_thresholds"] = torch.full((4,), threshold).numpy()
        (depths[threshold],) = session.session.run(["depth"], feed)
    assert set(depths[-1e9][seen.bool()]) == {1}
    assert set(depths[1e9][seen.bool()]) == {4}
    assert len(set(depths[None][seen.bool()])) > 1


def test_without_thresholds_nothing_is_tested(tmp_path):
    program = with_exits("at=[1, 2], criterion=margin")
    found = Onnx(check=True).write(program, tmp_path)
    names = {i["name"] for i in found["graphs"]["loop"]["inputs"]}
    assert "exit_thresholds" not in names
    model = onnx.load(tmp_path / "loop.onnx", load_external_data=False)
    assert "TopK" not in {n.op_type for n in nodes_of(model.graph)}
