from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from reroll.errors import ProgramError
from reroll.rewrite.analysis import tolerances
from reroll.rewrite.analysis.samples import random_inputs
from reroll.rewrite.ir.interpret import complete, materialise, run, widened
from reroll.rewrite.ir.matching import argument
from tests.captured import captured, flat, model
from tests.programs import F32, tiny

BOUNDS = (0.25, 0.5, 1.0)
IDS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("program", [flat, captured])
def test_it_computes_what_the_model_computes(name, program):
    made = model(name)
    made.set_attn_implementation("eager")
    with torch.no_grad():
        expected = made(IDS).logits
    actual = run(program(name), {"input_ids": IDS})
    tolerance = tolerances.ROLLED[F32]
    assert tolerances.relative_rms(actual["logits"], expected) <= tolerance


def test_left_padding_is_as_in_the_model():
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    made = model("llama")
    made.set_attn_implementation("eager")
    with torch.no_grad():
        expected = made(IDS, attention_mask=mask, position_ids=positions).logits
    inputs = {"input_ids": IDS, "attention_mask": mask, "position_ids": positions}
    actual = run(captured("llama"), inputs)["logits"]
    assert tolerances.relative_rms(actual, expected) <= tolerances.ROLLED[F32]
    unmasked = run(captured("llama"), {"input_ids": IDS})["logits"]
    assert tolerances.relative_rms(actual, unmasked) > 1e-2


@pytest.mark.parametrize("name", ["llama", "gemma3", "bert", "whisper", "dinov2"])
@pytest.mark.parametrize("padded", [False, True])
def test_fast_attention_is_the_same_up_to_rounding(name, padded):
    program = captured(name)
    inputs = random_inputs(program, length=24, padded=padded)
    weights = materialise(program)
    slow = run(program, inputs, weights=weights)
    fast = run(program, inputs, weights=weights, fast=True)
    for output, expected in slow.items():
        assert tolerances.relative_rms(fast[output], expected) <= tolerances.forward(F32)


def bounded():
    """`tiny` with a bound in every trip."""
    program = tiny(trips=3).edit()
    node = program.loops[0].node
    node.args = (*node.args[:2], (BOUNDS,), 3)
    return program


def test_a_loop_takes_its_inputs_and_weights_trip_by_trip():
    program, ids = bounded(), torch.tensor([[0, 3, 15]])
    weights = materialise(program)
    h = weights["embed.weight", 0][ids]
    for trip, bound in enumerate(BOUNDS):
        norm = weights["layers.*.norm.weight", trip]
        x = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-5) * norm
        x = x @ weights["layers.*.proj.weight", trip].T
        h = h + x.clamp(max=bound)
    expected = h @ weights["embed.weight", 0].T
    actual = run(program, {"input_ids": ids})["logits"]
    assert tolerances.relative_rms(actual, expected) < 1e-6


def test_tied_entries_are_used_by_all_of_their_trips():
    program, ids = bounded(), torch.tensor([[0, 3, 15]])
    weight = program.weights["layers.*.proj.weight"]
    tied = replace(weight, entries=weight.entries[:2], index=(1, 0, 1))
    spelled = replace(weight, entries=tuple(weight.entries[i] for i in (1, 0, 1)))
    a, b = (
        program.with_weights(program.weights.with_weight("layers.*.proj.weight", w))
        for w in (tied, spelled)
    )
    assert run(a, {"input_ids": ids})["logits"].equal(run(b, {"input_ids": ids})["logits"])


def test_half_precision_programs_run_in_fp32():
    narrow, wide = captured("llama", torch.bfloat16), captured("llama")
    assert narrow.dtype == torch.bfloat16
    inputs = {"input_ids": IDS}
    in_half = run(narrow, inputs)["logits"]
    in_fp32 = run(narrow, inputs, dtype=F32)["logits"]
    assert (in_half.dtype, in_fp32.dtype) == (torch.bfloat16, F32)
    # the weights are those of the fp32 model, rounded to bf16
    reference = {key: t.bfloat16().float() for key, t in materialise(wide).items()}
    inv_freq = {k: t for k, t in materialise(wide).items() if "inv_freq" in k[0]}
    exact = run(wide, inputs, weights={**reference, **inv_freq})["logits"]
    assert tolerances.relative_rms(in_fp32, exact) <= tolerances.forward(F32)
    assert tolerances.relative_rms(in_half, exact) > 1e-3


def test_a_narrower_dtype_is_refused():
    with pytest.raises(ProgramError, match="does not run in"):
        run(captured("llama"), {"input_ids": IDS}, dtype=torch.bfloat16)


def test_widened_weights_are_not_rounded():
    program = captured("llama", torch.bfloat16)
    assert {w.meta.dtype for w in widened(program, F32).weights.values()} == {F32}
    assert torch.bfloat16 in {w.meta.dtype for w in program.weights.values()}


def test_inputs_with_a_role_may_be_left_out():
    program = captured("llama")
    given = complete(program, {"input_ids": IDS})
    assert given["attention_mask"].equal(torch.ones(2, 6, dtype=torch.long))
    assert given["position_ids"].equal(torch.arange(6).expand(2, 6))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "input_ids' is missing"),
        ({"input_ids": IDS, "inputs": IDS}, "no input 'inputs'"),
        ({"input_ids": IDS[0]}, r"\[6\], not \['b', 's'\]"),
        ({"input_ids": IDS, "position_ids": IDS[:, :3]}, r"\[2, 3\]"),
    ],
)
def test_wrong_inputs_are_named(inputs, message):
    with pytest.raises(ProgramError, match=message):
        run(captured("llama"), inputs)


def test_a_failing_node_is_named():
    program = bounded()
    linear = next(n for n in program.graph.nodes if "linear" in n.name)
    linear.args = (linear.args[0], linear.args[0])
    with pytest.raises(ProgramError, match=f"main, {linear.name}: aten.linear"):
        run(program, {"input_ids": IDS})


def test_values_are_dropped_after_their_last_use():
    held = []
    program = captured("llama").edit()
    nodes = [n for n in program.bodies["model.layers"].graph.nodes if n.op == "call_function"]

    from reroll.rewrite.ir import interpret

    original = interpret._Interpreter.call

    def spy(self, name, node, values, trip):
        if node in nodes:
            held.append(len(values))
        return original(self, name, node, values, trip)

    interpret._Interpreter.call = spy
    try:
        run(program, {"input_ids": IDS})
    finally:
        interpret._Interpreter.call = original
    assert max(held) < len(nodes) / 2


def test_the_window_of_a_trip_reaches_its_attention():
    program = captured("gemma3")
    (loop,) = program.loops
    attention = next(n for n in loop.body.graph.nodes if "attention" in str(n.target))
    assert argument(attention, "causal") is True
    long = torch.randint(0, 64, (1, 32))
    made = model("gemma3")
    made.set_attn_implementation("eager")
    with torch.no_grad():
        expected = made(long).logits
    actual = run(program, {"input_ids": long})["logits"]
    assert tolerances.relative_rms(actual, expected) <= tolerances.ROLLED[F32]
