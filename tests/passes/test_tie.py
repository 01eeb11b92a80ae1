from __future__ import annotations

import copy
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reroll.errors import PassError, UsageError
from reroll.passes.tie.tie import assignment, starts
from reroll.rewrite.analysis import tolerances
from reroll.rewrite.ir.interpret import materialise, run
from reroll.rewrite.ir.text.compare import same
from reroll.rewrite.pipeline.manager import run_passes
from reroll.rewrite.pipeline.pipeline import parse_pipeline
from tests.captured import captured, flat, model
from tests.conformance.pass_suite import PassSuite

IDS = torch.arange(12).reshape(2, 6)
LAYOUTS = ("cycle", "sequence", "middle_cycle")


class TestConformance(PassSuite):
    pipeline = "tie(blocks=2)"


class TestMiddle(PassSuite):
    pipeline = "tie(blocks=3, layout=middle_cycle, init=stepwise, norms=true)"
    models = ("whisper", "gemma3")


class TestScaling(PassSuite):
    pipeline = "tie(blocks=2, layout=sequence, scaling=true)"
    models = ("llama", "vit")


def tied(name: str, options: str, dtype=torch.float32):
    return run_passes(captured(name, dtype), f"tie({options})", measure=False)


SIZES = st.integers(1, 60).flatmap(lambda trips: st.tuples(st.just(trips), st.integers(1, trips)))


@given(SIZES, st.sampled_from(LAYOUTS))
def test_every_block_is_used_about_equally_often(sizes, layout):
    trips, blocks = sizes
    if layout == "middle_cycle" and blocks < 3:
        return
    index = assignment(trips, blocks, layout)
    assert len(index) == trips
    uses = Counter(index)
    assert set(uses) == set(range(blocks))
    if layout == "middle_cycle":
        assert uses.pop(0) == uses.pop(blocks - 1) == 1
        assert (index[0], index[-1]) == (0, blocks - 1)
    assert max(uses.values()) - min(uses.values()) <= 1
    if layout == "sequence":
        assert list(index) == sorted(index)


@given(SIZES, st.sampled_from(LAYOUTS), st.sampled_from(["stepwise", "lower"]))
def test_blocks_start_as_different_layers_in_order(sizes, layout, init):
    trips, blocks = sizes
    if layout == "middle_cycle" and blocks < 3:
        return
    first = starts(trips, blocks, layout, init)
    assert list(first) == sorted(set(first))
    assert len(first) == blocks
    assert first[0] >= 0
    assert first[-1] <= trips - 1


@given(SIZES)
def test_stepwise_is_evenly_spaced(sizes):
    trips, blocks = sizes
    exact = np.linspace(0, trips - 1, blocks)
    assert np.abs(np.array(starts(trips, blocks, "cycle", "stepwise")) - exact).max() < 0.5001


def test_the_layouts_of_the_paper():
    # Relaxed Recursive Transformers, and the layouts of Mixture-of-Recursions
    assert assignment(6, 3, "cycle") == (0, 1, 2, 0, 1, 2)
    assert assignment(6, 3, "sequence") == (0, 0, 1, 1, 2, 2)
    assert assignment(8, 5, "middle_cycle") == (0, 1, 2, 3, 1, 2, 3, 4)
    assert starts(8, 5, "middle_cycle", "stepwise") == (0, 1, 4, 6, 7)
    assert starts(8, 5, "middle_cycle", "lower") == (0, 1, 2, 3, 7)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("init", ["average", "stepwise", "lower"])
def test_blocks_are_made_of_the_layers_that_share_them(layout, init):
    program = tied("llama", f"blocks=2, layout={layout}, init={init}")
    name = "model.layers.*.mlp.up_proj.weight"
    original, shared = materialise(captured("llama")), materialise(program)
    for trip, block in enumerate(program.weights[name].index):
        members = [t for t, b in enumerate(program.weights[name].index) if b == block]
        assert trip in members
        if init == "average":
            expected = torch.stack([original[name, t] for t in members]).mean(0)
            assert tolerances.relative_rms(shared[name, block], expected) < 1e-6
        else:
            source = {"stepwise": (0, 3), "lower": (0, 1)}[init][block]
            assert shared[name, block].equal(original[name, source])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_tied_program_computes_what_the_model_with_shared_layers_computes(name):
    made = copy.deepcopy(model(name))
    made.set_attn_implementation("eager")
    layers = made.model.layers if name == "llama" else made.transformer.h
    for a, b in ((0, 2), (1, 3)):
        pairs = zip(layers[a].named_parameters(), layers[b].parameters(), strict=True)
        for (path, p), q in pairs:
            if "norm" not in path and "ln_" not in path:
                p.data = q.data = (p.data + q.data) / 2
    with torch.no_grad():
        expected = made(IDS).logits
    actual = run(tied(name, "blocks=2"), {"input_ids": IDS})["logits"]
    assert tolerances.relative_rms(actual, expected) <= tolerances.ROLLED[torch.float32]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "qwen2"])
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("blocks", [1, 2, 3, 4])
def test_parameters_are_those_of_the_blocks(name, norms, blocks):
    program = captured(name)
    layer = sum(w.meta.elements for n, w in program.weights.items() if w.index is not None)
    norm = sum(
        w.meta.elements
        for n, w in program.weights.items()
        if w.index is not None and ("norm" in n or "ln_" in n)
    )
    kept = 0 if norms else norm
    expected = program.parameters() - (4 - blocks) * (layer - kept)
    assert tied(name, f"blocks={blocks}, norms={str(norms).lower()}").parameters() == expected


def test_norms_stay_one_per_layer():
    program = tied("gpt2", "blocks=2")
    assert program.weights["transformer.h.*.ln_1.bias"].index == (0, 1, 2, 3)
    assert program.weights["transformer.h.*.mlp.c_fc.bias"].index == (0, 1, 0, 1)
    assert "transformer.h.*.ln_1.bias" not in program.reference
    program = tied("gpt2", "blocks=2, norms=true")
    assert program.weights["transformer.h.*.ln_1.bias"].index == (0, 1, 0, 1)


def test_as_many_blocks_as_layers_change_nothing():
    for options in ("blocks=4", "blocks=4, init=stepwise", "blocks=4, layout=middle_cycle"):
        program = tied("llama", options)
        assert same(program, captured("llama"))
        assert not program.reference


def test_what_was_tied_is_kept():
    program = tied("llama", "blocks=2")
    original = captured("llama").weights
    assert dict(program.reference) == {name: original[name] for name in original if "_proj" in name}
    # tying on leaves the first form
    again = run_passes(program, "tie(blocks=1)", measure=False)
    assert again.reference == program.reference


def test_each_of_several_loops_gets_its_blocks():
    encoder, decoder = (loop.name for loop in captured("whisper").loops)
    weight = f"{decoder}.*.fc1.weight"
    other = f"{encoder}.*.fc1.weight"
    for options, counts in (
        ("blocks=2", (2, 2)),
        ("blocks=[1, 3]", (1, 3)),
        (f"blocks={{{decoder}: 1}}", (3, 1)),
    ):
        weights = tied("whisper", options).weights
        assert (len(weights[other].entries), len(weights[weight].entries)) == counts


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llama", "blocks=5", "model.layers has 4 trips, which cannot use 5 blocks"),
        ("llama", "blocks=[2, 2]", "2 numbers for 1 loops\n  hint: the loops are model.layers"),
        ("llama", "blocks={model.layer: 2}", "did you mean model.layers"),
    ],
)
def test_what_does_not_fit_the_program_is_an_error(name, options, message):
    with pytest.raises(PassError) as caught:
        tied(name, options)
    assert message in str(caught.value)


@pytest.mark.parametrize("options", ["blocks=0", "blocks=2, layout=middle_cycle", "blocks=[]"])
def test_impossible_numbers_are_refused_at_once(options):
    with pytest.raises(UsageError, match="blocks must be"):
        parse_pipeline(f"tie({options})")


def test_a_program_without_loops_is_refused():
    with pytest.raises(PassError, match="no loop"):
        run_passes(flat("llama"), "tie(blocks=2)")


def test_a_mean_in_half_precision_is_rounded_once():
    program = tied("llama", "blocks=1", torch.bfloat16)
    name = "model.layers.*.self_attn.q_proj.weight"
    layers = materialise(captured("llama", torch.bfloat16))
    exact = sum(layers[name, t].float() for t in range(4)) / 4
    assert materialise(program)[name, 0].equal(exact.bfloat16())


def test_a_trip_of_several_layers_is_tied_as_a_whole():
    (loop,) = captured("smollm3").loops
    assert (loop.trips, loop.period, loop.layers) == (3, 4, 12)
    program = tied("smollm3", "blocks=2")
    for layer in range(4):
        weight = program.weights[f"model.layers.trips.*.{layer}.mlp.up_proj.weight"]
        assert (len(weight.entries), weight.index) == (2, (0, 1, 0))
    remark = program.origin.steps[-1].remarks[0]
    assert remark.startswith("model.layers: 3 trips of 4 layers each share 2 blocks (0 1 0)")


def test_it_says_what_it_tied():
    remark = tied("llama", "blocks=3").origin.steps[-1].remarks[0]
    assert remark.startswith("model.layers: 4 trips share 3 blocks (0 1 2 0); 7 weights tied")


def test_scaling_by_the_step_changes_nothing_until_it_is_trained():
    plain = tied("llama", "blocks=2, layout=sequence")
    program = tied("llama", "blocks=2, layout=sequence, scaling=true")
    expected = run(plain, {"input_ids": IDS})["logits"]
    actual = run(program, {"input_ids": IDS})["logits"]
    assert tolerances.relative_rms(actual, expected) <= tolerances.forward(torch.float32)
    step = next(v for v in program.loops[0].inputs if isinstance(v, tuple))
    assert step == (0.0, 1.0, 0.0, 1.0)
    sizes = {n: w for n, w in program.weights.items() if ".step." in n}
    # attention, MLP and the whole, for two blocks
    assert sum(w.elements() for w in sizes.values()) == 2 * (16 + 16 + 3 * 32 * 16 + 3 * 32)
    lowered = program.to_module()
    lowered(IDS, labels=IDS).loss.backward()
    gradients = [p.grad for n, p in lowered.named_parameters() if "step.down" in n]
    assert gradients
    assert all(g.norm() > 0 for g in gradients)
    assert lowered.generate(IDS + 3, max_new_tokens=4, do_sample=False).shape == (2, 10)
