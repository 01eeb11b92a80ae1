"""The plan of an export: whole before the first node is written, and frozen."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path

import onnx
import pytest

import reroll
from reroll.errors import ExportError
from reroll.export.onnx import Onnx
from reroll.export.onnx.plan.graphs import GraphPlan
from reroll.export.onnx.plan.record import make_plan
from reroll.export.onnx.plan.settings import Settings
from reroll.rewrite.ir import lowerings
from reroll.rewrite.ir.program import Program
from tests.captured import captured
from tests.export.onnx.test_onnx_precision import wide

CASES = {
    "plain": (None, ("loop", "unrolled")),
    "a round at a time": ("tie(blocks=2), relax(rank=4)", ("loop", "step")),
    "windows": ("window(size=5, sinks=2)", ("loop", "unrolled")),
    "recurrences": ("linearize(mixer=rwkv6, window=4, sinks=1)", ("loop",)),
    "exits": ("insert_exits(at=[1, 2], criterion=latent, threshold=-0.6)", ("loop", "unrolled")),
}


def rewritten(passes: str | None) -> Program:
    program = captured("llama")
    return program if passes is None else reroll.run_passes(program, passes, measure=False)


def check(program: Program, kinds: tuple[str, ...], directory: Path, precision: str) -> None:
    """Compare the files with a plan that was made without writing any."""
    plan = make_plan(program, Settings(precision), kinds)
    found = Onnx(graphs=kinds, precision=precision).write(program, directory)
    assert list(found["graphs"]) == list(plan.graphs)
    read = set()
    for name, graph in plan.graphs.items():
        model = onnx.load(directory / f"{name}.onnx", load_external_data=False)
        stored = {t.name: t for t in model.graph.initializer if t.external_data}
        planned = {i.name: i for i in graph.initializers if i.offset is not None}
        assert stored.keys() == planned.keys()
        for each, tensor in stored.items():
            where = {entry.key: entry.value for entry in tensor.external_data}
            assert tuple(tensor.dims) == planned[each].shape
            assert int(where["offset"]) == planned[each].offset
            assert int(where["length"]) == planned[each].bytes
        check_states(graph, model)
        read |= {i.offset for i in planned.values()}
    assert found["weights"]["bytes"] == plan.size
    assert list(found["weights"]["sha256"]) == [region.name for region in plan.regions]
    # every region is for a weight that a graph reads
    for region in plan.regions:
        assert any(region.offset <= at < region.offset + region.bytes for at in read), region.name


def check_states(graph: GraphPlan, model: onnx.ModelProto) -> None:
    inputs = [i.name for i in model.graph.input]
    outputs = [o.name for o in model.graph.output]
    assert [s.input for s in graph.states] == [n for n in inputs if n.startswith("past_")]
    assert [s.output for s in graph.states] == [n for n in outputs if n.startswith("present.")]
    assert bool(graph.thresholds) == ("exit_thresholds" in inputs)


@pytest.mark.parametrize("name", CASES)
def test_the_files_hold_what_is_planned_and_nothing_else(name, tmp_path):
    passes, kinds = CASES[name]
    check(rewritten(passes), kinds, tmp_path, "fp32")


@pytest.mark.parametrize("precision", ["int4", "fp16"])
def test_other_forms_are_planned_as_well(precision, tmp_path):
    check(wide(2), ("loop", "step"), tmp_path, precision)


def test_a_plan_is_frozen():
    plan = make_plan(captured("llama"), Settings(), ["loop"])
    graph = plan.graphs["loop"]
    with pytest.raises(FrozenInstanceError):
        plan.size = 0
    with pytest.raises(FrozenInstanceError):
        graph.states = ()
    with pytest.raises(TypeError):
        plan.graphs["unrolled"] = graph
    with pytest.raises(TypeError):
        del graph.reads[next(iter(graph.reads))]
    with pytest.raises(FrozenInstanceError):
        graph.initializers[0].offset = 0


def test_its_text_is_readable():
    text = str(make_plan(wide(2), Settings("int4"), ["loop"]))
    lines = text.splitlines()
    assert lines[0] == "int4, opset 23, runtime any"
    assert "  model.layers: trips 0 to 3, a Loop of 2 rounds" in lines
    size = "[batch_size, 2, past_sequence_length, 32]"
    assert f"  state past_key_values.0.key: float32 {size}" in lines
    assert "  weight model.embed_tokens.weight.int8x32.view: uint8 [300, 128] at 0" in lines
    assert "  0 model.embed_tokens.weight.int8x32: uint8 [1, 300, 4, 32]" in lines


def test_a_state_that_is_not_planned_is_named(tmp_path, monkeypatch):
    program = reroll.run_passes(
        captured("llama"), "linearize(mixer=mlstm, window=0, sinks=0)", measure=False
    )
    monkeypatch.delitem(lowerings._lowerings, ("onnx", "states:mlstm"))
    with pytest.raises(ExportError, match="'maximum' is not planned") as error:
        Onnx(graphs=("loop",)).write(program, tmp_path)
    assert "states:NAME" in error.value.hint
