"""Our kernels against those of flash-linear-attention 0.6, both in Triton's interpreter."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from reroll.kernels import dispatch, interpreter
from reroll.kernels.delta import delta_forward
from reroll.kernels.recurrence import diagonal
from reroll.mixers import make
from reroll.mixers.delta_form import unit
from reroll.rewrite.analysis import tolerances
from tests.conformance.mixer_suite import assert_close
from tests.kernels.inputs import Call, draw, with_gradients

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("fla") is None, reason="pip install --no-deps fla-core==0.6.0 einops"
    ),
]

SCALE = 0.25
TILES = {"delta_scan": {"BT": 32, "BK": 32, "BV": 32, "num_warps": 4, "num_stages": 1}}
# both sides sum in an order of their own
TOLERANCE = tolerances.FORWARD_TRITON_FP32


def theirs(module: str, name: str) -> Any:
    from importlib import import_module

    found = getattr(import_module(f"fla.ops.{module}"), name)
    interpreter.give_ranges("fla")
    return found


def by_time(*tensors: Tensor) -> list[Tensor]:
    return [t.transpose(1, 2).contiguous() for t in tensors]


@pytest.mark.parametrize(
    ("mixer", "module", "name"),
    [("gla", "gla", "chunk_gla"), ("retention", "simple_gla", "chunk_simple_gla")],
)
@pytest.mark.parametrize("packed", [False, True])
def test_recurrences_and_their_gradients(mixer: str, module: str, name: str, packed: bool) -> None:
    op = theirs(module, name)
    starts = torch.tensor([0, 40, 75]) if packed else None
    call = draw(make(mixer), 75, heads=2, d_k=32, d_v=32, sequences=2 if packed else 1)

    def ours(q: Tensor, k: Tensor, v: Tensor, gates: Any, state: Tensor) -> Any:
        cut = None if starts is None else starts.int()
        return diagonal(q, k, v, gates[0], state, cut, SCALE, 32, "ieee")

    def oracle(q: Tensor, k: Tensor, v: Tensor, gates: Any, state: Tensor) -> Any:
        q, k, v, g = by_time(q, k, v, gates[0])
        return op(q, k, v, g=g, scale=SCALE, initial_state=state, output_final_state=True,
                  cu_seqlens=starts)  # fmt: skip

    wanted = with_gradients(oracle, call)
    for key, value in with_gradients(ours, call).items():
        assert_close(value, wanted[key], TOLERANCE, key)


@pytest.mark.parametrize("packed", [False, True])
def test_the_gated_delta_rule(packed: bool) -> None:
    op = theirs("gated_delta_rule", "chunk_gated_delta_rule")
    starts = torch.tensor([0, 40, 75]) if packed else None
    call = draw(make("gated_deltanet", {"negative": True}), 75, heads=2, d_k=32, d_v=32,
                sequences=2 if packed else 1)  # fmt: skip
    q, k, (g, beta) = unit(call.q), unit(call.k), call.gates
    cut = None if starts is None else starts.int()
    out, end = delta_forward(q, k, call.v, g, beta, call.state, cut, SCALE, TILES)
    a, b, c, d, e = by_time(q, k, call.v, g, beta)
    wanted, state = op(a, b, c, g=d, beta=e, scale=SCALE, initial_state=call.state,
                       output_final_state=True, cu_seqlens=starts)  # fmt: skip
    assert_close(out, wanted, TOLERANCE, "out")
    assert_close(end, state, TOLERANCE, "end")


@pytest.mark.parametrize("name", ["retention", "gla", "gated_deltanet"])
def test_the_backend_is_the_mixer(name: str) -> None:
    mixer = make(name)
    call = draw(mixer, 40, heads=1, groups=2, d_k=32, d_v=32)

    def run(form: Any, x: Call) -> dict[str, Tensor]:
        return with_gradients(
            lambda q, k, v, g, s: (lambda o, e: (o, e[0]))(*form(mixer, q, k, v, g, (s,))), x
        )

    theirs("gla", "chunk_gla")
    wanted = run(lambda m, *x: m.chunk(*x), call)
    with dispatch.use("fla"):
        found = run(dispatch.chunk, call)
    for key, value in found.items():
        tolerance = TOLERANCE if key in ("out", "end") else tolerances.GRADIENT
        assert_close(value, wanted[key], tolerance, key)


@pytest.mark.parametrize("name", ["retention", "gla", "gated_deltanet"])
def test_the_backend_takes_packed_sequences(name: str) -> None:
    mixer = make(name)
    call = draw(mixer, 40, batch=2, heads=1, groups=2, d_k=32, d_v=32)
    segments = torch.tensor([[0] * 3 + [1] * 17 + [0] * 20, [5] * 40])
    theirs("gla", "chunk_gla")
    wanted, (end,) = mixer.parallel(*call[:4], (call.state,), segments=segments)
    with dispatch.use("fla"):
        found, (state,) = dispatch.chunk(mixer, *call[:4], (call.state,), segments=segments)
    assert_close(found, wanted, TOLERANCE, "out")
    assert_close(state, end, TOLERANCE, "state")
