"""The delta rule in Triton's interpreter, against the mixers' definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from reroll.kernels.delta import delta_forward
from reroll.mixers import make
from reroll.mixers.delta_form import unit
from reroll.rewrite.analysis import tolerances
from tests.conformance.mixer_suite import assert_close
from tests.kernels.inputs import Call, draw

TILES = {"delta_scan": {"BT": 32, "BK": 32, "BV": 32, "num_warps": 4, "num_stages": 1}}


def run(name: str, call: Call, scale: float, starts: Any = None) -> tuple[Any, Any]:
    g = call.gates[0] if len(call.gates) == 2 else None
    q, k = (unit(x).to(call.k.dtype) for x in (call.q, call.k))
    return delta_forward(
        q, k, call.v, g, call.gates[-1], call.state, starts, scale, TILES, "ieee"
    )  # fmt: skip


@pytest.mark.parametrize("time", [1, 31, 32, 33, 100])
@pytest.mark.parametrize("name", ["deltanet", "gated_deltanet", "kda"])
def test_it_is_the_mixer_at_any_length(name: str, time: int) -> None:
    mixer = make(name, {"negative": True, "scale": 0.5})
    call = draw(mixer, time, heads=1, groups=2, d_k=24, d_v=20)
    out, end = run(name, call, 0.5)
    wanted, (state,) = mixer.parallel(*call[:4], (call.state,))
    assert_close(out, wanted, tolerances.FORWARD_TRITON_FP32, "out")
    assert_close(end, state, tolerances.FORWARD_TRITON_FP32, "end")


def test_in_bf16() -> None:
    mixer = make("gated_deltanet", {"negative": True, "scale": 0.5})
    call = draw(mixer, 70, batch=3, heads=1, dtype=torch.bfloat16)
    # keys of length one are rounded before the kernel sees them: the reference gets the same
    call = call._replace(q=unit(call.q).bfloat16(), k=unit(call.k).bfloat16())
    plain = make("gated_deltanet", {"negative": True, "scale": 0.5, "unit_keys": False})
    g, beta = call.gates
    out, end = delta_forward(call.q, call.k, call.v, g, beta, call.state, None, 0.5, TILES)
    wanted, (state,) = plain.parallel(*call[:4], (call.state,))
    assert_close(out, wanted, tolerances.FORWARD[torch.bfloat16], "out")
    assert_close(end, state, tolerances.FORWARD[torch.bfloat16], "end")


def test_keys_that_are_alike_and_writes_that_flip() -> None:
    """Where a Neumann series would lose all digits: M is 2 below the diagonal."""
    mixer = make("deltanet", {"negative": True})
    call = draw(mixer, 64, heads=1)
    k = call.k[:, :, :1].expand_as(call.k).contiguous()
    call = call._replace(k=k, gates=(torch.full_like(call.gates[0], 1.999),))
    out, end = run("deltanet", call, 0.25)
    wanted, (state,) = mixer.parallel(*call[:4], (call.state,))
    assert_close(out, wanted, tolerances.FORWARD_TRITON_FP32, "out")
    assert_close(end, state, tolerances.FORWARD_TRITON_FP32, "end")


def test_packed_sequences() -> None:
    mixer = make("gated_deltanet", {"scale": 0.5})
    call = draw(mixer, 75, heads=1, sequences=2)
    starts = torch.tensor([0, 33, 75], dtype=torch.int32)
    out, end = run("gated_deltanet", call, 0.5, starts)
    for i, part in enumerate((slice(0, 33), slice(33, 75))):
        x = [t[:, :, part] for t in call[:3]]
        gates = [g[:, :, part] for g in call.gates]
        wanted, (state,) = mixer.parallel(*x, gates, (call.state[i : i + 1],))
        assert_close(out[:, part], wanted, tolerances.FORWARD_TRITON_FP32, "out")
        assert_close(end[i : i + 1], state, tolerances.FORWARD_TRITON_FP32, "end")
