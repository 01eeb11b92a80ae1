"""What is seen of a Program: blocks, ranks, what mixes tokens, exits, state and stages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import reroll
from reroll.evaluate.picture import CONTEXTS, LoopPicture, picture, stages
from reroll.rewrite.analysis.costs import state_bytes
from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.records import Step
from tests import captured

NAMES = ["llama", "gemma3", "smollm3", "bert", "whisper", "lfm2", "vit"]


def rewritten(name: str, passes: str) -> Program:
    return reroll.run_passes(captured.captured(name), passes, measure=False)


def loop_of(program: Program) -> LoopPicture:
    (loop,) = picture(program, "it").loops
    return loop


@pytest.mark.parametrize("name", NAMES)
def test_what_the_parts_have_adds_up(name: str) -> None:
    program = captured.captured(name)
    seen = picture(program, name)
    assert sum(part.parameters for part in seen.parts) == program.parameters()
    assert sum(part.bytes for part in seen.parts) == program.weights.bytes()
    for context in CONTEXTS:
        assert sum(part.state[context] for part in seen.parts) == state_bytes(program, context)
    assert [len(loop.trips) for loop in seen.loops] == [loop.trips for loop in program.loops]


def test_shared_blocks_and_ranks() -> None:
    program = rewritten("llama", "tie(blocks=2), relax(rank=2)")
    loop = loop_of(program)
    shared, own = loop.sharing
    assert shared.index == (0, 1, 0, 1)
    assert shared.is_shared
    assert shared.entries == 2
    assert "self_attn.q_proj" in shared.weights
    assert own.index == (0, 1, 2, 3)
    assert {name.split("_")[-1] for name in own.weights} == {"layernorm"}
    assert {each.weight for each in loop.residuals} == set(shared.weights)
    assert all(each.ranks == (2, 2, 2, 2) for each in loop.residuals)
    # a residual stands with its layer, and is no op of its own
    lines = [line for line in loop.body if line.op == "linear"]
    assert len(lines) == 7
    assert all(line.note == "+ residual of rank 2" for line in lines)
    assert len({line.result for line in loop.body}) == len(loop.body)


def test_without_a_pass_nothing_is_shared() -> None:
    loop = loop_of(captured.captured("llama"))
    assert not any(each.is_shared for each in loop.sharing)
    assert loop.residuals == ()
    assert loop.exits == ()


def test_a_trip_without_a_residual_has_rank_0_also_when_saved(tmp_path: Path) -> None:
    program = rewritten("llama", "tie(blocks=3), relax(rank=2)")
    index = loop_of(program).sharing[0].index
    expected = tuple(2 if index.count(block) > 1 else 0 for block in index)
    assert 0 in expected
    assert all(each.ranks == expected for each in loop_of(program).residuals)
    program.save(str(tmp_path / "out"))
    again = loop_of(reroll.load(str(tmp_path / "out")))
    assert all(each.ranks == expected for each in again.residuals)


def test_ranks_of_a_budget_add_up_over_its_parts() -> None:
    loop = loop_of(rewritten("llama", "tie(blocks=2), relax(budget=0.2, step=2)"))
    assert len({rank for each in loop.residuals for rank in each.ranks}) > 1


def test_windows_are_seen_layer_by_layer() -> None:
    loop = loop_of(rewritten("llama", "window(size=3, keep=[0])"))
    assert [[m.name for m in trip.mixings] for trip in loop.trips] == [["all"]] + [["window 3"]] * 3
    assert "the first 4" in loop.trips[1].mixings[0].what
    assert loop.trips[0].state[4096] > loop.trips[1].state[4096] == loop.trips[1].state[1024]
    assert [trip.layers for trip in loop.trips] == [(0,), (1,), (2,), (3,)]


@pytest.mark.parametrize("window", [0, 4])
def test_a_recurrence_that_is_not_active_is_not_seen(window: int) -> None:
    passes = f"linearize(mixer=retention, window={window}, keep=[0, 2])"
    loop = loop_of(rewritten("llama", passes))
    mixer = ["retention"] if window == 0 else ["retention", "window 4"]
    found = [sorted(m.name for m in trip.mixings) for trip in loop.trips]
    assert found == [["all"], mixer, ["all"], mixer]
    # nor is what only such a trip would read
    gates = [s for s in loop.sharing if any("mixer" in name for name in s.weights)]
    assert gates
    assert all(s.index == (None, 0, None, 1) for s in gates)
    assert loop.trips[0].parameters < loop.trips[1].parameters


@pytest.mark.parametrize(
    "options", ["mixer=linear, combine=joint", "mixer=retention, combine=sum", "mixer=gsa"]
)
def test_however_a_mixer_is_combined_idle_trips_read_nothing_of_it(options: str) -> None:
    loop = loop_of(rewritten("llama", f"linearize({options}, window=4, keep=[0, 2])"))
    assert [len(trip.mixings) for trip in loop.trips] == [1, 2, 1, 2]
    gates = [s.index for s in loop.sharing if any("mixer" in name for name in s.weights)]
    assert gates == [(None, 0, None, 1)]


def test_exits_stand_where_they_were_inserted() -> None:
    program = rewritten("llama", "insert_exits(at=[1, 2], criterion=margin)")
    exits = loop_of(program).exits
    assert [(each.after, each.threshold) for each in exits] == [(1, None), (2, None)]
    # without the passes nothing says where closed ones stand
    lost = replace(program, origin=replace(program.origin, steps=()))
    assert loop_of(lost).exits == ()


def test_attention_to_another_sequence_has_a_name_of_its_own() -> None:
    encoder, decoder = picture(captured.captured("whisper"), "it").loops
    assert [m.name for m in encoder.trips[0].mixings] == ["all"]
    assert [m.name for m in decoder.trips[0].mixings] == ["all", "cross"]


def test_stages_are_the_capture_and_the_passes() -> None:
    program = rewritten("llama", "tie(blocks=2), relax(rank=2)")
    first, tie, relax = stages(program)
    assert first.name == "capture LlamaForCausalLM"
    assert (tie.name, relax.name) == ("tie(blocks=2)", "relax(rank=2)")
    change = next(c for c in tie.changes if c.label == "parameters")
    assert change.before == captured.captured("llama").parameters()
    # what stayed as it was is not listed
    assert not any("state" in c.label for c in tie.changes)


def test_measurements_of_any_shape_are_taken() -> None:
    pair = {"before": 3.0, "after": 5.0}
    quality = {
        "previous": {"inputs": "text", "kl": 0.5, "perplexity": pair, "tokens": 9},
        "original": {"inputs": "text", "kl": 0.5, "perplexity": {**pair, "before": 2.0}},
    }
    odd = {"before": "x", "after": None}
    measured = {"quality": quality, "odd": odd, "list": [1], "nan": float("nan"), "flag": True}
    program = captured.captured("llama")
    origin = replace(program.origin, steps=(Step("mine", 1.0, (), measured),))
    _, step = stages(replace(program, origin=origin))
    assert [(c.label, c.before, c.after) for c in step.changes] == [
        ("KL divergence, against the original", None, 0.5),
        ("perplexity, against the original", 2.0, 5.0),
        ("perplexity, against the pass before", 3.0, 5.0),
    ]
