"""One token onto a pool of states, in Triton's interpreter, against `Mixer.step`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from reroll.kernels.step import FLOOR_SIGMOID, GIVEN, LOG_SIGMOID, SOFTPLUS, step
from reroll.mixers import make
from reroll.rewrite.analysis import tolerances
from tests.conformance.mixer_suite import assert_close

TILES = {"BV": 16, "num_warps": 1}
ROWS, HEADS, GROUPS, D_K, D_V = 3, 2, 3, 24, 20

# the mixer, and how the kernel makes its decay of a raw number
CASES: list[tuple[str, dict[str, Any]]] = [
    ("retention", {"activation": LOG_SIGMOID}),
    ("gla", {"activation": LOG_SIGMOID, "normaliser": 16.0, "floor": -2.5}),
    ("gated_deltanet", {"activation": SOFTPLUS, "unit": True}),
    ("kda", {"activation": FLOOR_SIGMOID, "floor": -5.0, "unit": True}),
    ("deltanet", {"unit": True}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "keywords"), CASES)
def test_it_is_the_mixers_step(name: str, keywords: dict[str, Any], dtype: torch.dtype) -> None:
    exact = dtype == torch.float32
    tolerance = 1e-5 if exact else tolerances.FORWARD[dtype]
    torch.manual_seed(0)
    mixer = make(name, {"scale": 0.5})
    gates = mixer.gates(D_K, D_V)
    pool = torch.randn(5, HEADS, D_K, D_V)
    before, slots = pool.clone(), torch.tensor([4, 0, 2], dtype=torch.int32)
    state = pool[slots.long()]
    gain = torch.randn(HEADS * GROUPS)
    for _ in range(3):
        q, k, v = (torch.randn(ROWS, 1, n, d).to(dtype).transpose(1, 2) for n, d in
                   ((HEADS * GROUPS, D_K), (HEADS, D_K), (HEADS, D_V)))  # fmt: skip
        raw = [10 * torch.randn(ROWS, HEADS, 1, *g.shape) for g in gates]
        made = [g.activation(r) for g, r in zip(gates, raw, strict=True)]
        wanted, (state,) = mixer.step(q, k, v, made, (state,))
        decay = raw[0][:, :, 0] if gates[0].role == "decay" else None
        beta = made[-1][:, :, 0] if gates[-1].role == "write" else None
        out = step(
            q[:, :, 0], k[:, :, 0], v[:, :, 0], decay, beta, pool, slots,
            scale=0.5, gain=gain, tiles=TILES, **keywords,
        )  # fmt: skip
        assert_close(out, wanted[:, 0] * gain[:, None], tolerance, "out")
        assert_close(pool[slots.long()], state, tolerance, "state")
    assert torch.equal(pool[[1, 3]], before[[1, 3]]), "states of others are left alone"


def test_a_row_without_a_slot_touches_nothing() -> None:
    pool = torch.randn(2, HEADS, D_K, D_V)
    before, x = pool.clone(), torch.randn(2, HEADS, D_K)
    slots = torch.tensor([-1, 1], dtype=torch.int32)
    step(x, x, torch.randn(2, HEADS, D_V), None, None, pool, slots, tiles=TILES)
    assert torch.equal(pool[0], before[0])
    assert not torch.equal(pool[1], before[1])


def test_the_old_state_may_stay() -> None:
    x, v, g = torch.randn(2, 2, HEADS, D_K)[0], torch.randn(2, HEADS, D_V), -torch.rand(2, HEADS)
    state = torch.randn(2, HEADS, D_K, D_V)
    before, new = state.clone(), torch.empty_like(state)
    out = step(x, x, v, g, None, state, into=new, activation=GIVEN, tiles=TILES)
    assert torch.equal(state, before)
    wanted, (after,) = make("retention", {"scale": 1.0}).step(
        x[:, :, None], x[:, :, None], v[:, :, None], [g[:, :, None]], (before,)
    )
    assert_close(out, wanted[:, 0], tolerances.FORWARD[torch.float32], "out")
    assert_close(new, after, tolerances.FORWARD[torch.float32], "state")
