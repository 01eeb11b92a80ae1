"""Which states a Program has: their numbers, what they keep, and who reads them."""

from __future__ import annotations

import pytest

import reroll
from reroll.errors import ProgramError
from reroll.rewrite.analysis.state_plan import (
    before_cache,
    behind_cache,
    plan_states,
    readers,
    stateful_nodes,
)
from reroll.rewrite.ir.matching import argument
from reroll.rewrite.ir.ops import ATTENTION, CACHE, RMS_NORM, is_stateful
from reroll.rewrite.ir.ops.base import STATE
from tests import captured

LAYERS = 4


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_states_are_numbered_as_they_run(name: str) -> None:
    rolled = captured.captured(name)
    plan = plan_states(rolled)
    config = captured.model(name).config
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    assert [layer.layer_type for layer in plan.layers] == list(kinds)
    (loop,) = rolled.loops
    body = stateful_nodes(loop.body.graph)
    # trips come one after another, and within one the nodes in their order
    numbers = [plan.number(node, trip) for trip in range(loop.trips) for node in body]
    rest = [number for node in stateful_nodes(rolled.graph) for number in plan.numbers[node]]
    first = numbers[0]
    assert numbers == list(range(first, first + len(numbers)))
    assert sorted(numbers + rest) == list(range(len(plan.layers)))


def test_what_passes_put_in_the_place_of_attention_is_kept() -> None:
    program = captured.captured("llama")
    windowed = reroll.run_passes(program, "window(size=3, sinks=2, keep=[0])", measure=False)
    reach = [layer.reach for layer in plan_states(windowed).layers]
    assert reach == [("full_attention", None, 0)] + [("sliding_attention", 3, 2)] * (LAYERS - 1)
    linear = reroll.run_passes(program, "linearize(mixer=retention, window=0)", measure=False)
    kinds = {layer.layer_type for layer in plan_states(linear).layers}
    assert "hybrid_sliding" in kinds


def test_a_state_of_another_kind_has_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STATE, RMS_NORM, lambda node, place: 4)
    with pytest.raises(ProgramError, match="only caches, recurrences and the last inputs"):
        plan_states(captured.captured("llama"))


def test_an_encoder_keeps_nothing() -> None:
    assert plan_states(captured.captured("bert")).layers == ()


def test_the_way_from_an_attention_to_its_cache_and_back() -> None:
    (loop,) = captured.captured("llama").loops
    nodes = loop.body.graph.nodes
    (attention,) = (n for n in nodes if n.target is ATTENTION)
    (cache,) = (n for n in nodes if n.target is CACHE)
    keys, values = argument(attention, "k"), argument(attention, "v")
    assert is_stateful(cache)
    assert not is_stateful(attention)
    assert behind_cache(keys) is behind_cache(values) is cache
    assert behind_cache(argument(attention, "q")) is None
    assert (before_cache(keys), before_cache(values)) == cache.args[:2]
    assert set(readers(cache)) == {attention}
