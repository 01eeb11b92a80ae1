from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import fx

from reroll.errors import PassError
from reroll.rewrite.analysis import tolerances
from reroll.rewrite.analysis.samples import random_inputs
from reroll.rewrite.ir.interpret import materialise, run
from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.text.compare import same
from reroll.rewrite.pipeline.manager import run_passes
from tests.captured import captured, model
from tests.conformance.pass_suite import PassSuite

F32 = torch.float32
RMS_NORM, LAYER_NORM = "reroll.rms_norm.default", "aten.layer_norm.default"
PRE_NORM = ("gpt2", "gpt_neox", "bloom", "dinov2", "whisper")


class TestConformance(PassSuite):
    pipeline = "fold_norms"
    models = ("gpt2", "gpt_neox")


class TestUntied(PassSuite):
    pipeline = "fold_norms(untie=true)"
    models = ("gpt2", "whisper")


class TestAfterTying(PassSuite):
    pipeline = "tie(blocks=2), fold_norms"
    models = ("gpt2", "dinov2")


def folded(name: str, options: str = "", dtype=F32) -> Program:
    return run_passes(captured(name, dtype), f"fold_norms({options})", measure=False)


def nodes(program: Program, target: str) -> list[fx.Node]:
    return [n for _, g in program.graphs() for n in g.nodes if str(n.target) == target]


def largest_error(a: Program, b: Program) -> float:
    inputs = random_inputs(a, padded=True)
    expected, actual = run(a, inputs), run(b, inputs)
    return max(tolerances.relative_rms(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", PRE_NORM)
@pytest.mark.parametrize("untie", ["untie=true", "untie=false"])
def test_layer_norms_become_rms_norms_and_nothing_changes(name, untie):
    program = folded(name, untie)
    assert largest_error(captured(name), program) <= tolerances.ROLLED[F32]
    count = len(nodes(captured(name), LAYER_NORM))
    # BLOOM's norm of the embeddings alone keeps taking their mean away
    kept = 1 if name == "bloom" and untie == "untie=false" else 0
    assert len(nodes(program, LAYER_NORM)) == kept
    assert len(nodes(program, RMS_NORM)) == count - kept


def test_it_matches_the_model_itself():
    made = model("gpt2")
    made.set_attn_implementation("eager")
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        expected = made(ids).logits
    actual = run(folded("gpt2"), {"input_ids": ids})["logits"]
    assert tolerances.relative_rms(actual, expected) <= tolerances.ROLLED[F32]


@pytest.mark.parametrize("name", PRE_NORM)
def test_the_residual_stream_has_mean_zero(name):
    program = folded(name).edit()
    for graph in [program.graph, *(b.graph for b in program.bodies.values())]:
        assert not [n for n in graph.nodes if str(n.target) == LAYER_NORM] or name == "bloom"
    # show what every norm of the main graph reads in place of the outputs
    reads = [n.args[0] for n in program.graph.nodes if str(n.target) == RMS_NORM]
    output = next(n for n in program.graph.nodes if n.op == "output")
    output.args = (tuple(reads),)
    shown = replace(program, outputs=tuple(str(i) for i in range(len(reads))))
    for value in run(shown, random_inputs(shown)).values():
        assert value.mean(-1).abs().max() <= 1e-5 * value.abs().max()


def test_the_affine_part_goes_into_the_next_layer():
    original, program = captured("gpt2"), folded("gpt2")
    before, after = materialise(original), materialise(program)
    stem = "transformer.h.*"
    for trip in range(4):
        gain, shift = (before[f"{stem}.ln_1.{k}", trip] for k in ("weight", "bias"))
        weight, bias = (before[f"{stem}.attn.c_attn.{k}", trip] for k in ("weight", "bias"))
        new_weight, new_bias = (after[f"{stem}.attn.c_attn.{k}", trip] for k in ("weight", "bias"))
        assert tolerances.relative_rms(new_weight, weight * gain) < 1e-6
        assert tolerances.relative_rms(new_bias, bias + weight @ shift) < 1e-6
        weight, bias = (before[f"{stem}.mlp.c_proj.{k}", trip] for k in ("weight", "bias"))
        new_weight, new_bias = (after[f"{stem}.mlp.c_proj.{k}", trip] for k in ("weight", "bias"))
        assert tolerances.relative_rms(new_weight, weight - weight.mean(0)) < 1e-6
        assert tolerances.relative_rms(new_bias, bias - bias.mean()) < 1e-6
    assert not any("ln_1" in name or "ln_2" in name for name in program.weights)
    (loop,) = program.loops
    norms = [n for n in loop.body.graph.nodes if str(n.target) == RMS_NORM]
    assert [n.args[1:] for n in norms] == [(None, 1e-5, 0.0)] * 2


def test_a_tied_head_stays_tied_unless_asked():
    original = captured("gpt2")
    vocabulary, width = 64, 32
    norms = 4 * 4 * width
    assert folded("gpt2").parameters() == original.parameters() - norms
    program = folded("gpt2", "untie=true")
    # one more table and a bias for the head, and the last norm is gone as well
    added = vocabulary * width + vocabulary - 2 * width
    assert program.parameters() == original.parameters() - norms + added
    assert not nodes(program, "aten.mean.dim")
    assert len(nodes(folded("gpt2"), "aten.mean.dim")) == 1


def test_layer_scales_are_multiplied_into_their_matrix():
    before, after = (captured("dinov2"), folded("dinov2"))
    assert any("lambda1" in name for name in before.weights)
    assert not any("lambda1" in name for name in after.weights)
    assert len(nodes(after, "aten.mul.Tensor")) == len(nodes(before, "aten.mul.Tensor")) - 2


def test_post_norm_models_are_refused_with_the_node_in_the_way():
    with pytest.raises(PassError) as caught:
        folded("bert")
    text = str(caught.value)
    assert "no LayerNorm can become an RMSNorm" in text
    assert "reads the residual stream, and its mean with it" in text
    linears = {n.name for n in nodes(captured("bert"), "aten.linear.default")}
    assert any(f"(at {name})" in text for name in linears)


def test_a_model_of_rms_norms_stays_as_it_is():
    program = folded("llama")
    assert same(program, captured("llama"))
    assert program.origin.steps[-1].remarks == ("there is no LayerNorm",)


@pytest.mark.parametrize("name", ["gpt2", "dinov2"])
@pytest.mark.parametrize("norms", ["true", "false"])
def test_tied_blocks_stay_tied(name, norms):
    tied = run_passes(captured(name), f"tie(blocks=2, norms={norms})", measure=False)
    program = run_passes(tied, "fold_norms", measure=False)
    assert program.parameters() <= tied.parameters()
    assert largest_error(tied, program) <= tolerances.ROLLED[F32]
    # what the weights were before tying is rewritten alike
    full = run_passes(program, "relax(rank=full)", measure=False)
    assert largest_error(captured(name), full) <= tolerances.ROLLED[F32]


@pytest.mark.parametrize("options", ["rank=4", "rank=full"])
def test_it_can_run_before_tying(options):
    folded_first = run_passes(
        captured("gpt2"), f"fold_norms, tie(blocks=2), relax({options})", measure=False
    )
    error = largest_error(captured("gpt2"), folded_first)
    assert (error <= tolerances.ROLLED[F32]) == (options == "rank=full")


def test_in_half_precision_it_costs_no_more_than_rounding_the_weights():
    half = captured("gpt2", torch.bfloat16)
    program = folded("gpt2", dtype=torch.bfloat16)
    assert {w.meta.dtype for w in program.weights.values()} == {torch.bfloat16}
    inputs = random_inputs(half)
    exact = run(captured("gpt2"), inputs)["logits"]
    of_half, of_folded = (run(p, inputs, dtype=F32)["logits"] for p in (half, program))
    rounding = tolerances.relative_rms(of_half, exact)
    assert tolerances.relative_rms(of_folded, exact) < 2 * rounding


def with_body_edit(edit):
    program = captured("gpt2").edit()
    graph = program.loops[0].body.graph
    edit(graph, [n for n in graph.nodes if str(n.target) == LAYER_NORM])
    return program


def test_a_second_reader_of_the_stream_is_named():
    def square(graph, norms):
        x = norms[1].args[0]
        with graph.inserting_before(norms[1]):
            node = graph.call_function(torch.ops.aten.square.default, (x,))
            node.meta["type"] = x.meta["type"]
            total = graph.call_function(torch.ops.aten.mul.Tensor, (norms[0], node))
            total.meta["type"] = x.meta["type"]
        norms[1].replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)

    with pytest.raises(PassError, match="square_default reads the residual stream"):
        run_passes(with_body_edit(square), "fold_norms")


def test_a_writer_that_cannot_be_centred_is_named():
    def activate(graph, norms):
        add = norms[1].args[0]
        linear = next(a for a in add.args if "linear" in str(a.target) or "reshape" in a.name)
        with graph.inserting_after(linear):
            node = graph.call_function(torch.ops.aten.tanh.default, (linear,))
        node.meta["type"] = linear.meta["type"]
        add.replace_input_with(linear, node)

    with pytest.raises(PassError, match=r"tanh_default \(aten.tanh.default\) writes to the"):
        run_passes(with_body_edit(activate), "fold_norms")


def test_a_constant_added_to_the_stream_is_named():
    def shift(graph, norms):
        add = norms[1].args[0]
        with graph.inserting_after(add):
            node = graph.call_function(torch.ops.aten.add.Tensor, (add, 1.0))
        node.meta["type"] = add.meta["type"]
        add.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)

    with pytest.raises(PassError, match=r"add_tensor.* adds a constant to the residual stream"):
        run_passes(with_body_edit(shift), "fold_norms")


def test_a_norm_that_something_else_reads_keeps_its_weights():
    def also(graph, norms):
        x = norms[1].args[0]
        linear = next(iter(norms[1].users))
        with graph.inserting_after(linear):
            node = graph.call_function(torch.ops.aten.sum.dim_IntList, (norms[1], [-1], True))
        node.meta["type"] = replace(x.meta["type"], shape=(*x.meta["type"].shape[:-1], 1))
        with graph.inserting_after(node):
            scaled = graph.call_function(torch.ops.aten.mul.Tensor, (linear, node))
        scaled.meta["type"] = linear.meta["type"]
        linear.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)

    program = with_body_edit(also)
    result = run_passes(program, "fold_norms")
    assert largest_error(program, result) <= tolerances.forward(F32)
    norms = [n for n in result.loops[0].body.graph.nodes if str(n.target) == RMS_NORM]
    assert [n.args[1] is None for n in norms] == [True, False]
