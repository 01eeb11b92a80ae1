from __future__ import annotations

import pytest
import torch

from reroll.errors import ProgramError
from reroll.rewrite.analysis.samples import random_inputs
from reroll.rewrite.capture.rolling.split import find_loop, pack_trips, repeat_trip, split_loop
from reroll.rewrite.ir.interpret import run
from reroll.rewrite.ir.text.parser import parse
from reroll.rewrite.ir.verify import verify
from reroll.rewrite.pipeline.manager import run_passes
from tests.captured import captured

MODELS = ["llama", "gemma3", "smollm3", "gpt2", "dinov2", "whisper"]


def same_outputs(before, after):
    verify(after)
    assert str(parse(str(after))) == str(after)
    assert after.parameters() == before.parameters()
    inputs = random_inputs(before, padded=True)
    expected, actual = run(before, inputs), run(after, inputs)
    assert list(expected) == list(actual)
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


@pytest.mark.parametrize("name", MODELS)
def test_a_split_loop_computes_the_same_to_the_bit(name):
    program = captured(name)
    for loop in program.loops:
        places = range(1, loop.trips)
        edited = program.edit()
        result, pieces = split_loop(edited, find_loop(edited, loop.name), places)
        assert [piece.trips for piece in pieces] == [1] * loop.trips
        assert len(result.loops) == len(program.loops) + loop.trips - 1
        same_outputs(program, result)


def test_pieces_keep_their_layers_in_order():
    edited = captured("llama").edit()
    result, pieces = split_loop(edited, edited.loops[0], [1, 3])
    assert [p.name for p in pieces] == ["model.layers", "model.layers_1", "model.layers_3"]
    assert [p.trips for p in pieces] == [1, 2, 1]
    before, after = captured("llama").weights, result.weights
    name = "model.layers{}.*.mlp.up_proj.weight"
    layers = before[name.format("")].entries
    assert after[name.format("")].entries == layers[:1]
    assert after[name.format("_1")].entries == layers[1:3]
    assert after[name.format("_3")].entries == layers[3:]


def test_what_a_piece_has_in_common_is_no_longer_an_input_per_trip():
    # layers 0 and 2 of this model have a window, 1 and 3 have none
    edited = captured("gemma3").edit()
    assert any(isinstance(v, tuple) for v in edited.loops[0].inputs)
    result, pieces = split_loop(edited, edited.loops[0], [1, 2, 3])
    assert not any(isinstance(v, tuple) for p in result.loops for v in p.inputs)
    assert pieces[0].inputs != pieces[1].inputs
    assert pieces[0].inputs == pieces[2].inputs


def test_what_trips_shared_before_tying_is_split_too():
    program = run_passes(captured("llama"), "tie(blocks=2)", measure=False)
    edited = program.edit()
    result, pieces = split_loop(edited, edited.loops[0], [1])
    same_outputs(program, result)
    assert pieces[1].trips == 3
    weight = result.weights["model.layers_1.*.mlp.up_proj.weight"]
    assert weight.index == (0, 1, 0)
    reference = result.reference["model.layers_1.*.mlp.up_proj.weight"]
    original = captured("llama").weights["model.layers.*.mlp.up_proj.weight"]
    assert reference.entries == original.entries[1:]
    relaxed = run_passes(result, "relax(rank=full)", measure=False)
    inputs = random_inputs(program)
    assert torch.equal(run(relaxed, inputs)["logits"], run(captured("llama"), inputs)["logits"])


@pytest.mark.parametrize("name", MODELS)
def test_packed_trips_compute_the_same_to_the_bit(name):
    program = captured(name)
    for loop in program.loops:
        for count in (n for n in range(1, loop.trips + 1) if loop.trips % n == 0):
            edited = program.edit()
            result, packed = pack_trips(edited, find_loop(edited, loop.name), count)
            assert (packed.trips, packed.period) == (loop.trips // count, loop.period * count)
            same_outputs(program, result)


def test_packed_trips_keep_what_is_tied():
    program = run_passes(captured("llama"), "tie(blocks=2)", measure=False)
    edited = program.edit()
    result, _ = pack_trips(edited, edited.loops[0], 4)
    same_outputs(program, result)


def test_one_trip_can_be_repeated():
    program = captured("llama").edit()
    program, (_, middle, _) = split_loop(program, program.loops[0], [1, 3])
    once, middle = pack_trips(program, middle, 2)
    twice, _ = repeat_trip(once.edit(), find_loop(once, middle.name), 1)
    same_outputs(once, twice)
    edited = once.edit()
    result, middle = repeat_trip(edited, find_loop(edited, middle.name), 3)
    verify(result)
    assert [loop.layers for loop in result.loops] == [1, 6, 1]
    assert result.parameters() == captured("llama").parameters()
    with pytest.raises(ProgramError, match="has 3 trips"):
        repeat_trip(result, middle, 2)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_what_was_split_and_packed_generates_the_same(name):
    program = captured(name)
    edited = program.edit()
    result, pieces = split_loop(edited, edited.loops[0], [1, 3])
    result, _ = pack_trips(result, pieces[1], 2)
    ids = torch.arange(10).reshape(2, 5) + 3
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = program.to_module().generate(ids, **settings)
    assert result.to_module().generate(ids, **settings).equal(expected)


def test_places_outside_the_loop_are_errors():
    program = captured("llama").edit()
    with pytest.raises(ProgramError, match="cannot be cut at 5"):
        split_loop(program, program.loops[0], [2, 5])
    with pytest.raises(ProgramError, match="cannot be packed by 3"):
        pack_trips(program, program.loops[0], 3)
    with pytest.raises(ProgramError, match="there is no loop"):
        find_loop(program, "model.block")
    assert split_loop(program, program.loops[0], [0, 4]) == (program, [program.loops[0]])
