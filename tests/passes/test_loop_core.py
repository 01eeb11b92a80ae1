from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from reroll.errors import PassError, UsageError
from reroll.rewrite.analysis import tolerances
from reroll.rewrite.analysis.context import Context
from reroll.rewrite.analysis.hidden_inputs import angular_distance, block_influence, hidden_states
from reroll.rewrite.capture.rolling.split import find_loop, select_trips
from reroll.rewrite.ir.interpret import run
from reroll.rewrite.pipeline.manager import run_passes
from reroll.rewrite.pipeline.pipeline import parse_pipeline
from reroll.rewrite.pipeline.selection import ranges
from reroll.runtime.functions.trips import sample_trips
from tests.captured import captured
from tests.conformance.pass_suite import PassSuite

IDS = torch.arange(12).reshape(2, 6)
SETTINGS = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}


class TestInfluence(PassSuite):
    pipeline = "loop_core(prelude=1, core=1, coda=1, trips=3)"
    models = ("llama", "gemma3")


class TestAngular(PassSuite):
    pipeline = "loop_core(prelude=0, core=2, coda=1, trips=2, choose=angular, state=embedding)"
    models = ("gpt2", "vit")


def cored(options: str, name: str = "llama"):
    return run_passes(captured(name), f"loop_core({options})", measure=False)


def logits(program):
    return run(program, {"input_ids": IDS})["logits"]


def cut(layers, name="llama"):
    program = captured(name).edit()
    return select_trips(program, program.loops[0], layers)[0]


@pytest.mark.parametrize("state", ["zero", "embedding", "noise"])
@pytest.mark.parametrize("trips", [1, 2, 7])
def test_before_training_any_number_of_trips_gives_the_model_that_was_cut_down(state, trips):
    program = cored(f"prelude=1, core=[1], coda=1, trips={trips}, state={state}")
    # 0 * s + 1 * e, summed in another order than e alone
    error = tolerances.relative_rms(logits(program), logits(cut([0, 1, 3])))
    assert error <= tolerances.forward(torch.float32)
    width = 32
    assert program.parameters() == cut([0, 1, 3]).parameters() + 2 * width * width


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_it_generates_what_the_cut_down_model_generates(name, tmp_path):
    program = cored("prelude=1, core=[2], coda=1, trips=3", name)
    expected = cut([0, 2, 3], name).to_module().generate(IDS + 3, **SETTINGS)
    lowered = program.to_module()
    assert lowered.config.num_hidden_layers == 5
    assert lowered.generate(IDS + 3, **SETTINGS).equal(expected)
    assert lowered.generate(IDS + 3, use_cache=False, **SETTINGS).equal(expected)
    program.save(tmp_path / "out")
    loaded = type(lowered).from_pretrained(tmp_path / "out")
    assert loaded.generate(IDS + 3, **SETTINGS).equal(expected)


def trained(program):
    """The lowered model with an adapter that does not ignore the state."""
    lowered = program.to_module()
    for name, parameter in lowered.named_parameters():
        if "adapter" in name:
            torch.manual_seed(0)
            parameter.data += 0.2 * torch.randn_like(parameter)
    return lowered


def test_the_state_is_carried_once_the_adapter_reads_it():
    torch.manual_seed(0)
    program = trained(cored("prelude=1, core=[1, 2], coda=1, trips=3")).to_program()
    loop = find_loop(program, "model.layers_1")
    states = hidden_states(program, loop, Context())
    assert states.shape[0] == 4
    assert not states[0].any()
    assert all((a - b).norm() > 1e-3 * b.norm() for a, b in pairwise(states))


def test_the_module_runs_any_number_of_trips():
    lowered = trained(cored("prelude=1, core=[1, 2], coda=1, trips=3"))
    with torch.no_grad():
        three = lowered(IDS).logits
        lowered.set_trips(2)
        two = lowered(IDS).logits
        lowered.set_trips(6)
        with pytest.raises(UsageError, match="the caches are for 3 trips, and 6 are set"):
            lowered(IDS)
        six = lowered(IDS, use_cache=False).logits
        lowered.set_trips(None)
        assert lowered(IDS).logits.equal(three)
    assert not two.equal(three)
    assert not six.equal(three)
    again = trained(cored("prelude=1, core=[1, 2], coda=1, trips=2"))
    with torch.no_grad():
        assert again(IDS).logits.equal(two)
    lowered.set_trips(2)
    out = lowered.generate(IDS + 3, **SETTINGS)
    assert lowered.generate(IDS + 3, use_cache=False, **SETTINGS).equal(out)
    assert again.generate(IDS + 3, **SETTINGS).equal(out)


def test_gradients_flow_through_the_last_trips_only():
    lowered = trained(cored("prelude=1, core=[1, 2], coda=1, trips=3"))
    (adapter,) = {p for n, p in lowered.named_parameters() if "adapter" in n}

    def gradient(trips, backprop):
        lowered.zero_grad()
        lowered.set_trips(trips, backprop=backprop)
        lowered(IDS, labels=IDS, use_cache=False).loss.backward()
        return adapter.grad.clone()

    whole = gradient(4, None)
    assert gradient(4, 4).equal(whole)
    last = gradient(4, 1)
    assert last.norm() > 0
    assert not torch.allclose(last, whole)
    # the state's half of the adapter learns from the start, though it starts as zeros
    fresh = cored("prelude=1, core=[1, 2], coda=1, trips=3").to_module()
    fresh(IDS, labels=IDS).loss.backward()
    (adapter,) = {p for n, p in fresh.named_parameters() if "adapter" in n}
    assert adapter.grad[:, :32].norm() > 0


def test_only_trips_that_are_alike_can_be_set():
    with pytest.raises(UsageError, match="no loop can run another number of trips"):
        captured("llama").to_module().set_trips(2)
    lowered = cored("prelude=1, core=[1, 2], coda=1").to_module()
    with pytest.raises(UsageError, match="loops whose trips are alike"):
        lowered.set_trips(2, loop="nothing")
    with pytest.raises(UsageError, match="trips must be an integer, 1 or more"):
        lowered.set_trips(0)


def test_random_trips_have_their_mean():
    generator = torch.Generator().manual_seed(0)
    drawn = [sample_trips(6.0, backprop=4, generator=generator) for _ in range(4000)]
    counts = [n for n, _ in drawn]
    assert min(counts) >= 1
    assert sum(counts) / len(counts) == pytest.approx(7.0, rel=0.05)
    assert all(k == min(n, 4) for n, k in drawn)


# ---- which layers are kept


def test_the_layers_that_change_least_are_cut():
    program = captured("llama")
    context = Context()
    states = hidden_states(program, program.loops[0], context)
    assert states.shape == (5, 512, 32)
    influence = block_influence(states)
    by_hand = [
        1 - (a * b).sum(-1).div((a.norm(dim=-1) * b.norm(dim=-1)).clamp_min(1e-8)).mean().item()
        for a, b in pairwise(states)
    ]
    assert influence == pytest.approx(by_hand, abs=1e-5)
    least = min(range(4), key=lambda layer: influence[layer])
    kept = [layer for layer in range(4) if layer != least]
    remarks = cored("prelude=0, core=3, coda=0").origin.steps[-1].remarks
    assert f"runs the layers {ranges(kept)} 4 times; cut are {least}" in remarks[-1]
    start = min(range(3), key=lambda s: angular_distance(states, s, s + 2))
    remarks = cored("prelude=0, core=2, coda=0, choose=angular").origin.steps[-1].remarks
    assert f"cut are {start}-{start + 1}" in remarks[-1]
    remarks = cored("prelude=1, core=1, coda=1, choose=late").origin.steps[-1].remarks
    assert remarks == (
        "model.layers: of 4 layers, 1 run before the core and 1 after it; model.layers_1 runs the "
        "layers 2 4 times; cut are 1",
    )


def test_what_cannot_be_a_core():
    for options in ("prelude=1, core=0, coda=1", "prelude=1, core=[], coda=1"):
        with pytest.raises(UsageError, match="core must be"):
            parse_pipeline(f"loop_core({options})")
    with pytest.raises(PassError, match="fewer than"):
        cored("prelude=2, core=2, coda=1")
    for core in ("[0, 1]", "[2, 1]", "[1, 1]"):
        with pytest.raises(PassError, match="not an ascending list of layers from 1 to 2"):
            cored(f"prelude=1, core={core}, coda=1")
