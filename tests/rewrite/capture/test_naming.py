from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reroll.rewrite.capture.rolling.naming import Names, layers_per_trip
from tests.captured import captured


def stacks(*names: tuple[str, ...]):
    """What unifying found: the names of one weight in all trips, by the first of them."""
    return SimpleNamespace(stacks={trips[0]: trips for trips in names}, trips=len(names[0]))


def numbered(form: str, numbers) -> tuple[str, ...]:
    return tuple(form.format(n) for n in numbers)


LLAMA = [
    numbered("model.layers.{}.mlp.up_proj.weight", range(4)),
    numbered("model.layers.{}.input_layernorm.weight", range(4)),
]


def named(found, taken=("main",), weights=()):
    names = Names(found, set(taken), dict.fromkeys(weights))
    assert set(names.renamed) == set(found.stacks)
    assert len(set(names.renamed.values())) == len(names.renamed)
    assert not set(names.renamed.values()) & set(weights)
    assert names.loop not in taken
    return names


def test_a_loop_is_named_after_the_list_of_its_layers():
    names = named(stacks(*LLAMA))
    assert (names.loop, names.period) == ("model.layers", 1)
    assert list(names.renamed.values()) == [
        "model.layers.*.mlp.up_proj.weight",
        "model.layers.*.input_layernorm.weight",
    ]


def test_layers_of_one_trip_are_numbered():
    found = stacks(
        *(numbered("model.layers.{}.up.weight", range(first, 12, 4)) for first in range(4))
    )
    names = named(found)
    assert (names.loop, names.period) == ("model.layers", 4)
    assert layers_per_trip(found) == 4
    assert list(names.renamed.values()) == [f"model.layers.trips.*.{i}.up.weight" for i in range(4)]


def test_a_loop_after_the_first_layer_keeps_clear_of_it():
    outside = "model.layers.0.mlp.up_proj.weight"
    found = stacks(numbered("model.layers.{}.mlp.up_proj.weight", range(1, 4)))
    names = named(found, weights=[outside])
    assert (names.loop, names.period) == ("model.layers", 1)
    assert list(names.renamed.values()) == ["model.layers.trips.*.0.mlp.up_proj.weight"]


def test_trips_from_the_middle_of_a_layer_to_the_middle_of_the_next_run_one_layer():
    found = stacks(
        numbered("layers.{}.mlp.weight", range(4)), numbered("layers.{}.attn.weight", range(1, 5))
    )
    names = named(found)
    assert names.period == 1
    assert list(names.renamed.values()) == [
        "layers.trips.*.0.mlp.weight",
        "layers.trips.*.1.attn.weight",
    ]


def test_two_loops_over_one_list_have_two_names():
    first = named(stacks(*LLAMA))
    second = named(
        stacks(numbered("model.layers.{}.mlp.up_proj.weight", range(4, 8))),
        taken={"main", first.loop},
        weights=first.renamed.values(),
    )
    assert second.loop == "model.layers_"
    assert list(second.renamed.values()) == ["model.layers_.trips.*.0.mlp.up_proj.weight"]


def test_numbers_of_experts_are_not_numbers_of_layers():
    found = stacks(
        numbered("layers.{}.experts.0.up", range(3)), numbered("layers.{}.experts.1.up", range(3))
    )
    names = named(found)
    assert names.period == 1
    assert list(names.renamed.values()) == ["layers.*.experts.0.up", "layers.*.experts.1.up"]


def test_weights_that_all_trips_share_keep_their_place():
    shared = "encoder.layers.shared.weight"
    found = stacks(numbered("encoder.layers.{}.up.weight", range(3)), (shared,) * 3)
    names = named(found)
    assert names.renamed[shared] == "encoder.layers.*.shared.weight"
    foreign = "embedding.weight"
    names = named(stacks(numbered("encoder.layers.{}.up.weight", range(3)), (foreign,) * 3))
    assert names.renamed[foreign] == "encoder.layers.trips.*.embedding.weight"


def test_names_that_say_nothing_are_kept_as_they_are():
    names = named(stacks(("p17", "p3", "q"), ("r", "p2", "p17x")))
    assert (names.loop, names.period) == ("loop0", 1)
    assert list(names.renamed.values()) == ["loop0.trips.*.p17", "loop0.trips.*.r"]
    assert layers_per_trip(stacks(("p17", "p3", "q"))) == 1
    assert named(stacks(("a", "b")), taken={"main", "loop0"}).loop == "loop1"


def test_names_of_one_module_share_its_path():
    names = named(stacks(("net.stem.up.weight", "net.late.up.weight")))
    assert names.loop == "net.stem.up"


def test_a_number_at_the_top_needs_a_name():
    names = named(stacks(numbered("{}.weight", range(3))))
    assert names.loop == "loop0"
    assert list(names.renamed.values()) == ["loop0.trips.*.0.weight"]


@pytest.mark.parametrize(
    ("name", "loops", "weight"),
    [
        ("llama", ["model.layers"], "model.layers.*.self_attn.q_proj.weight"),
        ("gpt2", ["transformer.h"], "transformer.h.*.attn.c_attn.weight"),
        ("bert", ["encoder.layer"], "encoder.layer.*.attention.self.query.weight"),
        ("smollm3", ["model.layers"], "model.layers.trips.*.3.mlp.up_proj.weight"),
        (
            "t5",
            ["encoder.block", "decoder.block"],
            "decoder.block.*.layer.1.EncDecAttention.k.weight",
        ),
    ],
)
def test_names_in_real_models(name, loops, weight):
    program = captured(name)
    assert [loop.name for loop in program.loops] == loops
    assert weight in program.weights


PARTS = st.sampled_from(["a", "layers", "0", "1", "weight", "trips"])
NAMES = st.lists(PARTS, min_size=1, max_size=4).map(".".join)


@given(
    st.integers(2, 4).flatmap(
        lambda trips: st.lists(
            st.tuples(*[NAMES] * trips), min_size=1, max_size=5, unique_by=lambda names: names[0]
        )
    ),
    st.sets(NAMES, max_size=4),
    st.sets(st.sampled_from(["a", "layers", "loop0", "a.layers"])),
)
def test_any_names_become_distinct_ones(names, weights, taken):
    found = stacks(*names)
    made = named(found, taken={"main", *taken}, weights=weights - {n for t in names for n in t})
    assert made.period >= 1
    assert all("*" in new.split(".") for new in made.renamed.values())
