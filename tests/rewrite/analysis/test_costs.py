from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from reroll.rewrite.analysis.costs import flops_per_token, state_bytes
from reroll.rewrite.ir.ops.base import FLOPS, STATE, register
from reroll.rewrite.pipeline.manager import run_passes
from tests.captured import captured, flat, model
from tests.programs import aten, tiny


def counted(name: str, context: int) -> tuple[int, int]:
    """Operations of one decode step after `context - 1` tokens, and the bytes of the cache then."""
    made = model(name)
    made.set_attn_implementation("eager")
    cache, ids = DynamicCache(), torch.randint(3, 64, (1, context))
    with torch.no_grad():
        if context > 1:
            made(ids[:, :-1], past_key_values=cache)
        with FlopCounterMode(display=False) as counter:
            made(ids[:, -1:], past_key_values=cache)
    by_module = counter.get_flop_counts()
    # the table of angles is computed by a product in transformers
    rotary = {n: sum(c.values()) for n, c in by_module.items() if n.endswith("rotary_emb")}
    held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    return sum(by_module["Global"].values()) - sum(rotary.values()), held


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("context", [1, 16])
def test_costs_are_those_of_a_decode_step(name, context):
    operations, held = counted(name, context)
    assert flops_per_token(captured(name), context) == operations
    assert state_bytes(captured(name), context) == held


def test_loops_cost_what_their_layers_cost():
    for context in (7, 1024):
        assert flops_per_token(flat("llama"), context) == flops_per_token(
            captured("llama"), context
        )
        assert state_bytes(flat("llama"), context) == state_bytes(captured("llama"), context)


def test_a_window_bounds_the_state_trip_by_trip():
    program = captured("gemma3")
    per_token = 2 * 2 * 8 * 4  # keys and values, kv_heads, head_dim, fp32
    assert state_bytes(program, 6) == 4 * 6 * per_token
    # two of the four layers see no more than 8 tokens
    assert state_bytes(program, 100) == (2 * 8 + 2 * 100) * per_token
    per_key = 2 * 4 * 2 * 8  # both products, heads, head_dim
    growth = flops_per_token(program, 100) - flops_per_token(program, 50)
    assert growth == 2 * 50 * per_key


def test_half_precision_halves_the_state():
    half = captured("llama", torch.bfloat16)
    assert 2 * state_bytes(half, 10) == state_bytes(captured("llama"), 10)


def test_a_model_without_cache_has_no_state():
    assert state_bytes(captured("bert"), 1000) == 0
    assert state_bytes(captured("dinov2"), 1000) == 0


def test_a_vision_model_counts_as_a_whole():
    made = model("dinov2")
    made.set_attn_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        made(torch.randn(1, 3, 28, 28))
    assert flops_per_token(captured("dinov2")) == counter.get_total_flops()


def test_tying_saves_no_operations_and_residuals_add_some():
    program = captured("llama")
    tied = run_passes(program, "tie(blocks=2)", measure=False)
    assert flops_per_token(tied) == flops_per_token(program)
    relaxed = run_passes(tied, "relax(rank=4)", measure=False)
    sizes = sum(
        sum(program.weights[name].meta.shape)
        for name in program.weights
        if "_proj" in name and "*" in name
    )
    assert flops_per_token(relaxed) - flops_per_token(program) == 4 * 2 * 4 * sizes


def test_a_new_op_brings_its_own_costs(monkeypatch):
    for rules in (FLOPS, STATE):
        # taken out again when the test ends
        monkeypatch.setitem(rules, aten.clamp.default, lambda node, place: 0)
    program = tiny(trips=3)
    before = flops_per_token(program, 10)
    register(
        aten.clamp.default,
        flops=lambda node, place: place.context,
        state=lambda node, place: 100 + place.trip,
    )
    assert flops_per_token(program, 10) == before + 3 * 10
    assert state_bytes(program, 10) == 300 + 0 + 1 + 2
