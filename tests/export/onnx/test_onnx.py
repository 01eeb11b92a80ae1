from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

import reroll
from reroll.cli.app import app
from reroll.errors import ExportError, UsageError
from reroll.export.onnx import Onnx
from reroll.export.onnx.emit.check import check_graph, prompts
from reroll.export.onnx.emit.session import Session
from reroll.export.onnx.plan.segments import Segment, rolled
from reroll.rewrite.analysis import tolerances
from reroll.rewrite.analysis.samples import random_inputs
from reroll.rewrite.ir.interpret import materialise, run
from reroll.rewrite.ir.lowerings import find_lowering, lowering
from reroll.rewrite.ir.program import Program
from tests import tiny
from tests.captured import captured, flat
from tests.captured import model as original
from tests.conformance.target_suite import TargetSuite
from tests.export.onnx.prompted import check_pieces, check_reference, inputs
from tests.programs import call, typed
from tests.programs import tiny as by_hand

pytestmark = pytest.mark.usefixtures("captured_once")

CAUSAL = ("llama", "gemma3", "smollm3", "gpt2", "bloom")
ENCODERS = ("bert", "dinov2", "vit")


class TestTarget(TargetSuite):
    target = "onnx"


def exported(program: Program, directory: Path, **options) -> dict:
    directory.mkdir(exist_ok=True)
    return Onnx(**options).write(program, directory)


def tied(blocks: int, layout: str = "cycle", rank: int = 4) -> Program:
    passes = f"tie(blocks={blocks}, layout={layout}), relax(rank={rank})"
    return reroll.run_passes(captured("llama"), passes, measure=False)


# ---- the same numbers


@pytest.mark.parametrize("name", [*CAUSAL, *ENCODERS])
def test_graphs_compute_what_the_module_does(name, tmp_path):
    found = exported(captured(name), tmp_path, check=True)
    for kind in ("loop", "unrolled"):
        assert found["graphs"][kind]["check"]["relative_rms_error"] < 1e-5
    assert bool(found["states"]) == (name in CAUSAL)


class CountsItself(LlamaForCausalLM):
    """Takes no positions: all rows have the same."""

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, **kwargs):
        return super().forward(input_ids, attention_mask, None, past_key_values, **kwargs)


def test_one_row_of_positions_turns_all_rows(tmp_path):
    program = reroll.capture(CountsItself(original("llama").config).eval())
    assert "position_ids" not in {each.name for each in program.inputs}
    found = exported(program, tmp_path, check=True)
    for kind in ("loop", "unrolled"):
        assert found["graphs"][kind]["check"]["relative_rms_error"] < 1e-5


@pytest.mark.parametrize("name", ["whisper", "t5"])
def test_of_an_encoder_decoder_model_the_encoder(name, tmp_path):
    program = captured(name)
    found = exported(program, tmp_path, check=True)
    assert [o["name"] for o in found["graphs"]["loop"]["outputs"]] == ["last_hidden_state"]
    assert not found["states"]
    assert found["part"] == "encoder"
    assert "decoder is not exported" in (tmp_path / "README.md").read_text()
    inputs = {k: v for k, v in random_inputs(program).items() if not k.startswith("decoder_")}
    given = {k: v for k, v in random_inputs(program).items() if k.startswith("decoder_")}
    expected = run(program, {**inputs, **given})["encoder_last_hidden_state"]
    session = Session(tmp_path / "loop.onnx")
    ones = {n: torch.ones_like(inputs["input_ids"]) for n in session.inputs if "mask" in n}
    actual = session.run({**inputs, **ones})["last_hidden_state"]
    assert tolerances.relative_rms(actual, expected) < 1e-5


@pytest.mark.parametrize("name", CAUSAL)
def test_attention_as_onnx_runtime_has_it(name, tmp_path):
    exported(captured(name), tmp_path, runtime="ort", check=True)
    model = onnx.load(tmp_path / "unrolled.onnx", load_external_data=False)
    kinds = [n.op_type for n in model.graph.node]
    assert "GroupQueryAttention" in kinds
    assert "Attention" not in kinds
    # the operator takes pieces of one row only
    check_pieces(captured(name), tmp_path / "loop.onnx", [7, 1, 16], rows=1)


def test_grouped_attention_takes_projections_as_they_are(tmp_path):
    """Heads are not put apart, turned, turned back and put together."""
    exported(captured("llama"), tmp_path, graphs=("unrolled",), runtime="ort")
    model = onnx.load(tmp_path / "unrolled.onnx", load_external_data=False)
    assert not [n.name for n in model.graph.node if n.op_type == "Transpose"]


def test_one_buffer_may_be_past_and_present(tmp_path):
    """A cache longer than its tokens, written where it lies."""
    program = captured("llama")
    exported(program, tmp_path, graphs=("unrolled",), runtime="ort")
    session = Session(tmp_path / "unrolled.onnx")
    ids, seen = prompts(program)
    session.reset(len(ids))
    expected = [session.run(inputs(ids, seen, *part))["logits"] for part in ((0, 23), (23, 24))]
    shapes = {n: (len(ids), *session.inputs[n].shape[1:2], 40, 8) for n in session.past}
    buffers = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
        for name, shape in shapes.items()
    }
    for part, wanted in zip(((0, 23), (23, 24)), expected, strict=True):
        binding = session.session.io_binding()
        for name, value in inputs(ids, seen, *part).items():
            binding.bind_cpu_input(name, value.contiguous().numpy())
        for name, buffer in buffers.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), buffer)
        binding.bind_output("logits")
        session.session.run_with_iobinding(binding)
        actual = torch.from_numpy(binding.copy_outputs_to_cpu()[-1])
        shown = seen[:, slice(*part)].bool()
        assert tolerances.relative_rms(actual[shown], wanted[shown]) < 1e-6


def test_without_loops(tmp_path):
    exported(flat("llama"), tmp_path, check=True)


@pytest.mark.parametrize(("blocks", "layout"), [(2, "cycle"), (2, "sequence"), (3, "middle_cycle")])
def test_tied_and_relaxed(blocks, layout, tmp_path):
    exported(tied(blocks, layout), tmp_path, check=True)


def test_a_bfloat16_program_is_exported_in_fp32(tmp_path):
    program = captured("llama", torch.bfloat16)
    exported(program, tmp_path)
    inputs = random_inputs(program)
    expected = run(program, inputs, dtype=torch.float32)["logits"]
    tokens = inputs["input_ids"]
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    seen = torch.ones_like(tokens)
    for kind in ("loop", "unrolled"):
        session = Session(tmp_path / f"{kind}.onnx")
        session.reset(len(tokens))
        given = {"input_ids": tokens, "attention_mask": seen, "position_ids": positions}
        assert tolerances.relative_rms(session.run(given)["logits"], expected) < 1e-5


def test_prefill_in_pieces_is_prefill_at_once(tmp_path):
    program = captured("gemma3")
    exported(program, tmp_path)
    for kind in ("loop", "unrolled"):
        check_pieces(program, tmp_path / f"{kind}.onnx", [7, 1, 16])


@pytest.mark.parametrize("kind", ["loop", "unrolled"])
def test_the_reference_evaluator_of_onnx_agrees(kind, tmp_path, monkeypatch):
    program = tied(2)
    exported(program, tmp_path, graphs=(kind,))
    check_reference(program, tmp_path / f"{kind}.onnx", monkeypatch)


# ---- what is in the files


def test_every_weight_is_stored_once(tmp_path):
    program = tied(2)
    found = exported(program, tmp_path)
    stored = sum(t.nbytes for t in materialise(program).values())
    padding = 4096 * len(program.weights)
    assert stored <= found["weights"]["bytes"] <= stored + padding
    for kind in ("loop", "unrolled"):
        assert found["graphs"][kind]["bytes"] < 50_000
        model = onnx.load(tmp_path / f"{kind}.onnx", load_external_data=False)
        inside = sum(len(t.raw_data) for t in model.graph.initializer)
        assert inside < 2000


def test_a_loop_is_as_large_for_any_depth(tmp_path):
    sizes = {}
    for layers in (4, 12):
        program = by_hand(layers)
        found = exported(program, tmp_path / str(layers))
        sizes[layers] = [found["graphs"][kind]["nodes"] for kind in ("loop", "unrolled")]
        body = loop_body(tmp_path / str(layers) / "loop.onnx")
        sizes[layers].append(len(body.node))
    assert sizes[12][0] == sizes[4][0]
    assert sizes[12][2] == sizes[4][2]
    assert sizes[12][1] > 2 * sizes[4][1]


def loop_body(path: Path) -> onnx.GraphProto:
    (loop,) = [
        n for n in onnx.load(path, load_external_data=False).graph.node if n.op_type == "Loop"
    ]
    return next(a.g for a in loop.attribute if a.name == "body")


def test_shared_weights_are_not_gathered(tmp_path):
    program = tied(2)
    exported(program, tmp_path, graphs=("loop",))
    names = {
        i for n in loop_body(tmp_path / "loop.onnx").node if n.op_type == "Gather" for i in n.input
    }
    gathered = {n for n in names if n.startswith("model.layers")}
    assert gathered
    assert all("lora" in n or "norm" in n for n in gathered)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny llama with a tokenizer, as a directory."""
    return tiny.save(tiny.llama(), tmp_path_factory.mktemp("model"), tiny.tokenizer())


def test_positions_that_the_model_computes_are_computed_by_the_graph(tmp_path):
    found = exported(captured("xlm_roberta"), tmp_path, graphs=("loop",), check=True)
    names = [i["name"] for i in found["graphs"]["loop"]["inputs"]]
    assert names == ["input_ids", "attention_mask"]
    assert found["computed_inputs"] == ["position_ids"]
    ids = torch.tensor([[5, 9, 1, 7, 1, 1], [1, 3, 8, 8, 30, 2]])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        expected = original("xlm_roberta")(**given).last_hidden_state
    actual = Session(tmp_path / "loop.onnx").run(given)["last_hidden_state"]
    assert tolerances.relative_rms(actual, expected) < 1e-5


def test_a_mask_that_the_model_would_make_of_its_tokens_is_an_input_all_the_same(tmp_path):
    program = reroll.capture(tiny.xlm())
    assert next(i for i in program.inputs if i.name == "attention_mask").default is not None
    found = exported(program, tmp_path, graphs=("loop",), check=True)
    assert "attention_mask" in [i["name"] for i in found["graphs"]["loop"]["inputs"]]


def test_positions_of_a_decoder_follow_from_its_mask(tmp_path):
    found = exported(captured("opt"), tmp_path, graphs=("loop",), check=True)
    names = [i["name"] for i in found["graphs"]["loop"]["inputs"]]
    assert names[:2] == ["input_ids", "attention_mask"]
    assert "position_ids" not in names
    config = json.loads((tmp_path / "genai_config.json").read_text())
    assert "position_ids" not in config["model"]["decoder"]["inputs"]


def test_names_and_manifest(model, tmp_path):
    path = model
    found = exported(reroll.capture(path), tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert {k: v for k, v in found.items() if k != "seconds"} == manifest
    graph = manifest["graphs"]["unrolled"]
    inputs = {i["name"]: i for i in graph["inputs"]}
    assert list(inputs)[:3] == ["input_ids", "attention_mask", "position_ids"]
    assert inputs["past_key_values.3.value"]["shape"] == [
        "batch_size",
        2,
        "past_sequence_length",
        8,
    ]
    outputs = {o["name"]: o for o in graph["outputs"]}
    assert outputs["logits"]["shape"] == ["batch_size", "sequence_length", tiny.WORDS]
    assert outputs["present.0.key"]["shape"] == ["batch_size", 2, "total_sequence_length", 8]
    assert {s["input"] for s in manifest["states"]} == {n for n in inputs if "past" in n}
    assert "tokenizer.json" in manifest["files"]
    assert (tmp_path / "out" / "README.md").read_text().count("unrolled.onnx") > 2
    config = json.loads((tmp_path / "out" / "genai_config.json").read_text())["model"]
    assert config["decoder"]["filename"] == "unrolled.onnx"
    assert config["decoder"]["num_hidden_layers"] == 4


# ---- segments


def test_segments():
    def of(blocks: int, layout: str, trips: int = 6) -> list[Segment]:
        program = by_hand(trips)
        program = reroll.run_passes(
            program, f"tie(blocks={blocks}, layout={layout})", measure=False
        )
        return rolled(program, program.loops[0])

    assert of(2, "cycle") == [Segment(0, 2, 3)]
    assert of(1, "cycle") == [Segment(0, 1, 6)]
    assert of(2, "sequence") == [Segment(0, 1, 3), Segment(3, 1, 3)]
    assert of(3, "middle_cycle") == [Segment(0, 1, 1), Segment(1, 1, 4), Segment(5, 1, 1)]
    # five trips and two blocks: two rounds, and one trip more
    assert of(2, "cycle", 5) == [Segment(0, 2, 2), Segment(4, 1, 1)]
    untied = by_hand(4)
    assert rolled(untied, untied.loops[0]) == [Segment(0, 1, 4)]
    # the residuals of trips that share nothing are no blocks
    relaxed = tied(3, "middle_cycle")
    assert rolled(relaxed, relaxed.loops[0])[1] == Segment(1, 1, 2)


# ---- ops


def with_op(op) -> Program:
    """A llama whose logits go through an op."""
    program = captured("llama").edit()
    end = next(iter(reversed(program.graph.nodes)))
    (logits,) = end.args[0]
    with program.graph.inserting_before(end):
        made = typed(call(program.graph, op, logits), *logits.meta["type"].shape)
    end.args = ((made,),)
    return program


@torch.library.custom_op("reroll_test::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


@twice.register_fake
def _(x):
    return torch.empty_like(x)


def test_an_op_without_a_lowering_is_named(tmp_path):
    with pytest.raises(ExportError, match=r"aten::lgamma\.default has no lowering") as error:
        exported(with_op(torch.ops.aten.lgamma.default), tmp_path)
    assert "lowering" in error.value.hint
    assert "lgamma_default" in error.value.where


def test_an_op_of_ones_own_brings_its_lowering(tmp_path):
    program = with_op(torch.ops.reroll_test.twice.default)

    @lowering("onnx", "reroll_test::twice.default")
    def lowered(g, node, x):
        return g.op("Add", x, x)

    exported(program, tmp_path, check=True)
    with pytest.raises(UsageError, match="two lowerings"):
        lowering("onnx", "reroll_test::twice.default")(lambda g, node, x: x)


def test_a_name_without_overload_is_for_all_overloads_but_those_with_a_lowering_of_theirs():
    every = lowering("onnx", "reroll_test::many")(lambda g, node, x: 1)
    one = lowering("onnx", "reroll_test::many.one")(lambda g, node, x: 2)
    assert find_lowering("onnx", "reroll_test::many.one") is one
    assert find_lowering("onnx", "reroll_test::many.other") is every
    assert find_lowering("onnx", "reroll_test::more.one") is None


# ---- checks and the command


def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    from reroll.export.onnx.emit import translate

    def wrong(g, node, gate, up, activation):
        return g.op("Mul", gate, up)

    true = translate.find_lowering
    monkeypatch.setattr(
        translate, "find_lowering", lambda t, op: wrong if "glu" in str(op) else true(t, op)
    )


def test_a_check_finds_what_is_wrong(tmp_path, monkeypatch):
    broken(monkeypatch)
    with pytest.raises(ExportError, match="differs from the torch module") as error:
        exported(captured("llama"), tmp_path, check=True)
    assert error.value.where == "loop.onnx"


def test_the_command(model, tmp_path, monkeypatch):
    path = model
    out = tmp_path / "onnx"

    def run_(*words: object, status: int = 0) -> str:
        result = CliRunner().invoke(app, ["export", str(path), *map(str, words)])
        assert result.exit_code == status, result.output
        return result.stdout if not status else result.stderr

    found = json.loads(run_(out, "--graphs", "unrolled", "--check", "--json"))
    assert found["graphs"]["unrolled"]["check"]["relative_rms_error"] < 1e-5
    assert set(found["sizes"]) >= {"unrolled.onnx", "weights.bin", "manifest.json", "README.md"}
    assert "exists" in run_(out, status=2)
    new = tmp_path / "new"
    assert "did you mean onnx" in run_(new, "--target", "onx", status=2)
    assert "loop" in run_(new, "--graphs", "lop", status=2)
    assert "did you mean" in run_(new, "--precison", "int8", status=2)
    assert "opset" in run_(new, "--opset", "17", status=2)
    broken(monkeypatch)
    assert "differs from the torch module" in run_(new, "--check", status=1)
    assert [p.name for p in tmp_path.iterdir()] == ["onnx"]
    listed = CliRunner().invoke(app, ["targets"])
    assert "--precision" in listed.stdout


def test_the_checker_is_asked(tmp_path):
    program = captured("bert")
    exported(program, tmp_path, graphs=("unrolled",))
    model = onnx.load(tmp_path / "unrolled.onnx", load_external_data=False)
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, tmp_path / "unrolled.onnx")
    with pytest.raises(ExportError, match="checker"):
        check_graph(tmp_path / "unrolled.onnx", program, program.to_module())


def test_a_side_file_cannot_leave_the_directory(tmp_path):
    program = captured("llama")
    bad = replace(program.origin, files={"../x": __file__})
    with pytest.raises(ExportError, match="would not be in the directory"):
        exported(replace(program, origin=bad), tmp_path)
