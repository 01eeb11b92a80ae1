"""The selective scan in Triton's interpreter, against the mixer's definition."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from reroll.errors import UsageError
from reroll.kernels import dispatch, selective, selective_backward
from reroll.kernels.recurrence import selective as op
from reroll.mixers import make
from reroll.rewrite.analysis import tolerances
from tests.conformance.mixer_suite import assert_close
from tests.conformance.mixer_suite import draw as drawn
from tests.conformance.mixer_suite import with_gradients as all_gradients
from tests.kernels.inputs import Call, draw, with_gradients

MIXER = make("mamba")
# tokens between kept states in these tests: the interpreter takes its time for each token
CHUNK = 8


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (selective, selective_backward):
        monkeypatch.setattr(module, "CHUNK", CHUNK)


def reference(q: Tensor, k: Tensor, v: Tensor, gates: Any, state: Tensor) -> Any:
    out, (end,) = MIXER.parallel(q, k, v, gates, (state,))
    return out, end


def kernel(starts: Tensor | None = None) -> Any:
    return lambda q, k, v, gates, state: op(q, k, v, *gates, state, starts)


def agree(call: Call, starts: Tensor | None = None, wanted: Any = reference) -> None:
    found, expected = with_gradients(kernel(starts), call), with_gradients(wanted, call)
    dtype = call.v.dtype
    assert set(found) == {"out", "end", "q", "k", "v", "gate 0", "gate 1", "state"}
    for key, value in found.items():
        assert value.dtype == expected[key].dtype
        tolerance = tolerances.FORWARD_TRITON_FP32
        if dtype != torch.float32:
            gradient = key not in ("out", "end")
            tolerance = tolerances.GRADIENT if gradient else tolerances.FORWARD[dtype]
        assert_close(value, expected[key], tolerance, key)


def once(call: Call) -> Call:
    """With rates that are the same for all tokens, given once."""
    return call._replace(gates=(call.gates[0], call.gates[1][:1, :, :1]))


@pytest.mark.parametrize("time", [1, 7, CHUNK, 2 * CHUNK + 1])
@pytest.mark.parametrize("constant", [True, False])
def test_it_is_the_mixer_at_any_length(time: int, constant: bool) -> None:
    call = draw(MIXER, time, batch=2, heads=1)
    agree(once(call) if constant else call)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_narrow_numbers(dtype: torch.dtype) -> None:
    agree(once(draw(MIXER, 20, heads=1, dtype=dtype)))


@pytest.mark.parametrize("constant", [True, False])
def test_query_heads_share_a_state(constant: bool) -> None:
    call = draw(MIXER, 5, batch=2, heads=2, groups=3, d_k=5, d_v=40)
    agree(once(call) if constant else call)


@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_sizes_with_the_tiles_that_are_shipped(size: int) -> None:
    agree(once(draw(MIXER, 3, heads=1, d_k=size, d_v=40)))


@pytest.mark.parametrize("constant", [True, False])
def test_packed_sequences(constant: bool) -> None:
    lengths = (1, 5, CHUNK, 11)
    call = draw(MIXER, sum(lengths), heads=1, sequences=len(lengths))
    call = once(call) if constant else call
    starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)

    def apart(q: Tensor, k: Tensor, v: Tensor, gates: Any, state: Tensor) -> Any:
        parts = []
        for n, (a, b) in enumerate(pairwise(starts.tolist())):
            rate = gates[1] if constant else gates[1][:, :, a:b]
            x = (x[:, :, a:b] for x in (q, k, v))
            parts.append(MIXER.parallel(*x, (gates[0][:, :, a:b], rate), (state[n : n + 1],)))
        return torch.cat([o for o, _ in parts], 1), torch.cat([s[0] for _, s in parts])

    agree(call, starts, apart)


@pytest.mark.parametrize("constant", [True, False])
def test_extreme_decays(constant: bool) -> None:
    call = draw(MIXER, 20, heads=1, spread=4.0)
    log_decays = call.gates[0][..., None, :] * call.gates[1]
    assert log_decays.min() < -1e4
    assert log_decays.max() > -1e-5
    agree(once(call) if constant else call)


def test_it_trains_with_rates_that_are_given_once() -> None:
    x = drawn(MIXER, torch.float32, time=12)
    x = x._replace(gates=(x.gates[0], x.gates[1][:1, :, :1]))
    padding = torch.ones(2, 12)
    padding[0, :3] = 0

    def chosen(backend: dispatch.Backend) -> dict[str, Tensor]:
        def run(*given: Any) -> Any:
            with dispatch.use(backend):
                return dispatch.chunk(MIXER, *given, padding=padding)

        return all_gradients(run, x)

    wanted = chosen("eager")
    for key, value in chosen("triton").items():
        assert_close(value, wanted[key], tolerances.FORWARD_TRITON_FP32, key)


def test_the_op_is_well_formed() -> None:
    q, k, v, dt, rate, state = once(draw(MIXER, 2, heads=1)).leaves()
    torch.library.opcheck(op, (q, k, v, dt, rate, state, None))


def test_what_no_tiles_do_is_refused() -> None:
    x = torch.zeros(1, 1, 4, 1024)
    with pytest.raises(UsageError, match="no kernel for heads of 1024"):
        op(x, x, x, x, torch.zeros(1, 1, 1, 1024, 1024), None, None)
    state = torch.zeros(1, 1, 1, 1024, 4)
    with (
        dispatch.use("triton"),
        pytest.raises(UsageError, match="no tiles of selective without spills for 1024 rows"),
    ):
        dispatch.chunk(MIXER, x, x, x[..., :4], (x[..., :4], state))
