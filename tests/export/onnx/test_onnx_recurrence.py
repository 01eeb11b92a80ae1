from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch

import reroll
from reroll.errors import ExportError
from reroll.export.onnx import Onnx
from reroll.export.onnx.emit.check import check_graph, prompts
from reroll.export.onnx.emit.session import Session
from reroll.export.onnx.graph import nodes_of
from reroll.mixers import registered, registry
from reroll.mixers.diagonal import Diagonal
from reroll.mixers.feature_maps import FEATURE_MAPS
from reroll.mixers.gates import decay_gate, log_sigmoid
from reroll.rewrite.analysis import tolerances
from reroll.rewrite.ir import lowerings
from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.weights import full
from tests import tiny
from tests.captured import captured
from tests.export.onnx.prompted import check_pieces, check_reference, inputs

pytestmark = pytest.mark.usefixtures("captured_once")

SLOW = pytest.mark.slow
MIXERS = tuple(registered())
# what a mixer keeps beside its recurrent state
MORE = {"mlstm": {"maximum"}, "gsa": {"slot_keys"}}


def linearized(options: str, gain: float = 0.7) -> Program:
    """A llama with mixers that are heard: their gains start at zero beside a window."""
    program = reroll.run_passes(captured("llama"), f"linearize({options})", measure=False)
    changed = {
        name: replace(
            weight,
            entries=tuple(
                full(weight.meta.shape, gain + 0.1 * place, torch.float32)
                for place in range(len(weight.entries))
            ),
        )
        for name, weight in program.weights.items()
        if name.endswith("mixer.gain")
    }
    assert changed
    return program.with_weights(program.weights.with_weights(changed))


def exported(program: Program, directory, **options) -> dict:
    """The manifest of an export whose graphs are exact over a prompt and 64 tokens."""
    found = Onnx(check=True, **options).write(program, directory)
    for graph in found["graphs"].values():
        assert graph["check"]["relative_rms_error"] < 1e-5
    return found


@pytest.mark.parametrize("mixer", MIXERS)
def test_mixers(mixer, tmp_path):
    program = linearized(f"mixer={mixer}, window=0, sinks=0")
    found = exported(program, tmp_path, graphs=("unrolled",))
    parts = {s["part"] for s in found["states"]}
    assert parts == {"recurrent_state"} | MORE.get(mixer, {"conv_state"})
    assert not any(s["grows"] for s in found["states"])


# each mixer is exported alone, above; these have another kind of state each
@pytest.mark.parametrize(
    "mixer",
    [m if m in ("linear", "mlstm", "gsa") else pytest.param(m, marks=SLOW) for m in MIXERS],
)
def test_beside_a_window(mixer, tmp_path):
    # two layers keep their attention, and the trips are no loop of one kind
    layers = ", layers=[1, 2]" if mixer == "linear" else ""
    program = linearized(f"mixer={mixer}, window=6, sinks=2{layers}")
    found = exported(program, tmp_path, graphs=("loop",))
    parts = {s["part"]: s for s in found["states"] if not s["grows"]}
    assert {"recurrent_state", "waiting", "key", "value"} <= set(parts)
    window = parts["waiting"]["shape"][2]
    assert parts["key"]["shape"][2] == window - 1
    grows = [s for s in found["states"] if s["grows"]]
    assert bool(grows) == bool(layers)
    check_pieces(program, tmp_path / "loop.onnx", [2, 1, 9, 12])


@pytest.mark.parametrize("features", [name for name in FEATURE_MAPS if name != "none"])
def test_feature_maps(features, tmp_path):
    options = f"mixer=gla, mixer_options={{feature_map: {features}}}, window=0, sinks=0"
    exported(linearized(options), tmp_path, graphs=("loop",))


@pytest.mark.parametrize("mixer", ["linear", pytest.param("gla", marks=SLOW)])
def test_joint_normalisation(mixer, tmp_path):
    options = f"mixer={mixer}, window=6, sinks=2, combine=joint, feature_map=hedgehog"
    exported(linearized(options, gain=20.0), tmp_path)


SLOTS = "mixer=gsa, mixer_options={slots: 5}, window=6, sinks=2, combine=joint"


def test_slots_and_a_window_under_one_softmax(tmp_path):
    exported(linearized(SLOTS, gain=20.0), tmp_path)


def test_slots_by_clusters(tmp_path):
    tiny.save(tiny.llama(2), tmp_path / "tiny", tiny.tokenizer())
    text = f"linearize({SLOTS}, gates=clustered, samples=1)"
    program = reroll.run_passes(reroll.capture(str(tmp_path / "tiny")), text, measure=False)
    out = tmp_path / "out"
    out.mkdir()
    exported(program, out, graphs=("loop",))


@pytest.mark.parametrize("name", ["bert", "vit"])
@pytest.mark.parametrize(
    "options", ["mixer=gla, window=0", "mixer=mlstm, window=4, sinks=2, gain=0.5"]
)
def test_from_both_ends(name, options, tmp_path):
    program = reroll.run_passes(captured(name), f"linearize({options})", measure=False)
    found = exported(program, tmp_path)
    assert not found["states"]


def test_tokens_that_left_write_nothing(tmp_path):
    passes = "linearize(mixer=gla, window=0, sinks=0), "
    passes += "insert_exits(at=[1, 2, 3], criterion=latent, threshold=-0.6, state=skip)"
    exported(reroll.run_passes(captured("llama"), passes, measure=False), tmp_path)


@pytest.mark.parametrize("options", ["size=8, sinks=2", "size=5"])
def test_windows(options, tmp_path):
    program = reroll.run_passes(captured("llama"), f"window({options})", measure=False)
    exported(program, tmp_path)


@pytest.mark.parametrize("mixer", ["mlstm", "gsa", "rwkv6", "deltaproduct", "mamba"])
def test_a_prompt_in_pieces(mixer, tmp_path):
    program = linearized(f"mixer={mixer}, window=0, sinks=0")
    Onnx(graphs=("loop",)).write(program, tmp_path)
    check_pieces(program, tmp_path / "loop.onnx", [2, 1, 9, 12])


@pytest.mark.parametrize("opset", [23, 27])
@pytest.mark.parametrize("mixer", ["linear", "gla", "deltanet", "gated_deltanet", "gsa"])
def test_what_has_no_kernel_runs_the_definition(mixer, opset, tmp_path, monkeypatch):
    program = linearized(f"mixer={mixer}, window=0, sinks=0")
    Onnx(graphs=("loop",), opset=opset).write(program, tmp_path)
    path = tmp_path / "loop.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    names = [f.name for f in onnx.load(path, load_external_data=False).functions]
    assert names == (["LinearAttention"] if opset < 27 else [])
    check_reference(program, path, monkeypatch)


def test_the_standard_operator_in_onnx_runtime(tmp_path, monkeypatch):
    """Which refuses an opset that is newer than it is, unless it is told not to."""
    program = linearized("mixer=gated_deltanet, window=4, sinks=2")
    path = tmp_path / "loop.onnx"
    Onnx(graphs=("loop",), opset=27).write(program, tmp_path)
    with pytest.raises(ExportError, match="under development") as error:
        Session(path)
    assert "ALLOW_RELEASED_ONNX_OPSET_ONLY" in str(error.value.hint)
    monkeypatch.setenv("ALLOW_RELEASED_ONNX_OPSET_ONLY", "0")
    found = check_graph(path, program, program.to_module())
    assert found["relative_rms_error"] < 1e-5


@pytest.mark.parametrize("mixer", ["linear", "gla", "deltaproduct", "gsa"])
def test_a_runtime_without_the_operator_runs_its_function(mixer, tmp_path):
    """Under another name, ONNX Runtime has no kernel for the operator."""
    program = linearized(f"mixer={mixer}, window=0, sinks=0")
    Onnx(graphs=("loop",)).write(program, tmp_path)
    model = onnx.load(tmp_path / "loop.onnx", load_external_data=False)
    nodes = [n for n in nodes_of(model.graph) if n.op_type == "LinearAttention"]
    assert len(nodes) == (2 if mixer == "gsa" else 1)
    for named in (*nodes, *model.functions):
        named.domain = "nobody"
    model.opset_import.append(onnx.helper.make_opsetid("nobody", 1))
    onnx.save(model, tmp_path / "other.onnx")
    with_kernel, without = (run(program, tmp_path / f"{name}.onnx") for name in ("loop", "other"))
    assert tolerances.relative_rms(without, with_kernel) < 1e-5


def run(program: Program, path: Path) -> torch.Tensor:
    """The logits of a prompt and of one more token, padding left out."""
    ids, seen = prompts(program)
    session = Session(path)
    session.reset(len(ids))
    parts = [(0, 23), (23, 24)]
    logits = [session.run(inputs(ids, seen, *part))["logits"] for part in parts]
    return torch.cat(logits, 1)[seen.bool()]


def test_a_mixer_without_a_construction_is_named(tmp_path, monkeypatch):
    program = linearized("mixer=rwkv6, window=0, sinks=0")
    monkeypatch.delitem(lowerings._lowerings, ("onnx", "recurrence:rwkv6"))
    with pytest.raises(ExportError, match="rwkv6 has no lowering") as error:
        Onnx().write(program, tmp_path)
    assert "recurrence:rwkv6" in error.value.hint


@pytest.fixture
def fade(monkeypatch):
    """A mixer that is one class, registered while a test runs."""
    monkeypatch.setattr(registry.MIXERS, "classes", dict(registered()))

    class Fade(Diagonal):
        """A decay for each head that the key's mean decides."""

        name = "fade"

        def gates(self, d_k, d_v):
            return (decay_gate(from_key={"paper": lambda k: log_sigmoid(k.mean(-1))}),)

    registry.register(Fade)
    return Fade


def test_a_new_mixer_on_a_core_is_exported_without_a_line_here(fade, tmp_path):
    exported(linearized("mixer=fade, gates=liger, window=3, sinks=1"), tmp_path)


def test_mathematics_of_its_own_take_the_core_away(fade):
    class Half(fade):
        """What is inherited no longer says what is computed."""

        def prepare(self, q, k, v, gates):
            return q, k / 2, v, gates

    assert fade.core is not None
    assert Half.core is None


def test_update_rules_that_share_no_function_are_refused(tmp_path):
    program = linearized("mixer=gla, window=0, sinks=0, layers=[0]")
    program = reroll.run_passes(
        program, "linearize(mixer=deltanet, window=0, sinks=0, layers=[1])", measure=False
    )
    with pytest.raises(ExportError, match="gated and delta") as error:
        Onnx().write(program, tmp_path)
    assert "--opset 27" in error.value.hint
    Onnx(opset=27).write(program, tmp_path)
