"""The chunked diagonal recurrence in Triton's interpreter, against the mixers' definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from reroll.errors import UsageError
from reroll.kernels import (
    configurations,
    diagonal,
    diagonal_backward,
    diagonal_fused,
    recurrence,
)
from reroll.kernels.recurrence import diagonal as op
from reroll.mixers import Mixer, make
from reroll.rewrite.analysis import tolerances
from tests.conformance.mixer_suite import assert_close
from tests.kernels.inputs import draw, poisoned, with_gradients

SCALE = 0.25
MIXERS = {name: make(name, {"scale": SCALE}) for name in ("retention", "gla")}
LIMIT = {"retention": 64, "gla": 32}


@pytest.fixture(params=["fused", "split"])
def backward(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether gradients come from one launch or from four, whatever the manifest has."""
    find = configurations.find_tiles

    def found(family: str, k: Tensor, v: Tensor, gate: int, precision: str, limit: int) -> Any:
        if family == "diagonal_fused":
            whole = {"BT": 32, "BK": 64, "BV": 64, "num_warps": 8, "num_stages": 1}
            return {"fused_back": whole} if request.param == "fused" else None
        return find(family, k, v, gate, precision, limit)

    monkeypatch.setattr(configurations, "find_tiles", found)
    name: str = request.param
    return name


def reference(mixer: Mixer, **keywords: Any) -> Any:
    def run(q: Tensor, k: Tensor, v: Tensor, gates: Any, state: Tensor) -> Any:
        out, (end,) = mixer.parallel(q, k, v, gates, (state,), **keywords)
        return out, end

    return run


def kernel(mixer: Mixer, starts: Tensor | None = None) -> Any:
    def run(q: Tensor, k: Tensor, v: Tensor, gates: Any, state: Tensor) -> Any:
        return op(q, k, v, gates[0], state, starts, SCALE, LIMIT[mixer.name], "ieee")

    return run


def agree(found: dict[str, Tensor], wanted: dict[str, Tensor], dtype: torch.dtype) -> None:
    for key, value in found.items():
        tolerance = tolerances.FORWARD_TRITON_FP32
        if dtype != torch.float32:
            gradient = key not in ("out", "end")
            tolerance = tolerances.GRADIENT if gradient else tolerances.FORWARD[dtype]
        assert_close(value, wanted[key].to(value.dtype), tolerance, key)


@pytest.mark.parametrize("time", [1, 7, 63, 64, 65, 200])
@pytest.mark.parametrize("name", list(MIXERS))
def test_it_is_the_mixer_at_any_length(name: str, time: int, backward: str) -> None:
    mixer, call = MIXERS[name], draw(MIXERS[name], time)
    agree(with_gradients(kernel(mixer), call), with_gradients(reference(mixer), call),
          torch.float32)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", list(MIXERS))
def test_in_narrow_numbers(name: str, dtype: torch.dtype, backward: str) -> None:
    mixer = MIXERS[name]
    call = draw(mixer, 70, dtype=dtype)
    agree(with_gradients(kernel(mixer), call), with_gradients(reference(mixer), call), dtype)


@pytest.mark.parametrize("name", list(MIXERS))
def test_query_heads_share_a_state(name: str, backward: str) -> None:
    mixer = MIXERS[name]
    call = draw(mixer, 33, batch=3, heads=1, groups=3, d_k=24, d_v=40)
    agree(with_gradients(kernel(mixer), call), with_gradients(reference(mixer), call),
          torch.float32)  # fmt: skip


@pytest.mark.parametrize("size", [32, 64, 128, 256])
@pytest.mark.parametrize("name", list(MIXERS))
def test_head_sizes_with_the_tiles_that_are_shipped(name: str, size: int) -> None:
    mixer = MIXERS[name]
    call = draw(mixer, 34, heads=1, d_k=size, d_v=size)

    def run(q: Tensor, k: Tensor, v: Tensor, gates: Any, state: Tensor) -> Any:
        return op(q, k, v, gates[0], state, None, SCALE, LIMIT[name], "tf32")

    agree(with_gradients(run, call), with_gradients(reference(mixer), call), torch.float32)


@pytest.mark.parametrize("name", list(MIXERS))
def test_packed_sequences(name: str, backward: str) -> None:
    mixer, lengths = MIXERS[name], (1, 40, 64, 30)
    call = draw(mixer, sum(lengths), heads=1, sequences=len(lengths))
    starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    found = with_gradients(kernel(mixer, starts), call)

    def apart(q: Tensor, k: Tensor, v: Tensor, gates: Any, state: Tensor) -> Any:
        parts = [
            mixer.parallel(
                *(x[:, :, a:b] for x in (q, k, v)), [g[:, :, a:b] for g in gates], (one[None],)
            )
            for a, b, one in zip(starts[:-1], starts[1:], state, strict=True)
        ]
        return torch.cat([o for o, _ in parts], 1), torch.cat([s[0] for _, s in parts])

    agree(found, with_gradients(apart, call), torch.float32)


@pytest.mark.parametrize("name", list(MIXERS))
def test_extreme_gates(name: str, backward: str) -> None:
    mixer = MIXERS[name]
    # from all kept to nothing left after one token, or to the floor
    call = draw(mixer, 100, heads=1, spread=40.0)
    assert call.gates[0].min() < (-30 if name == "retention" else -2.4)
    assert call.gates[0].max() > -1e-6
    agree(with_gradients(kernel(mixer), call), with_gradients(reference(mixer), call),
          torch.float32)  # fmt: skip


@pytest.mark.parametrize("gate", [0, 1, 2])
def test_blocks_do_not_show(gate: int) -> None:
    """Fused or split, with one block or several: the same."""
    mixer = MIXERS["gla" if gate == 2 else "retention"]
    call = draw(mixer, 40, heads=1, d_k=48, d_v=33)
    g = call.gates[0] if gate else None
    whole = {"BT": 32, "BK": 64, "BV": 64, "num_warps": 4, "num_stages": 1}
    blocks = whole | {"BT": 16, "BK": 16, "BV": 32}
    x = call.q, call.k, call.v, g, call.state, None
    wanted = diagonal.forward(*x, SCALE, {"scan": whole})
    found = diagonal.forward(*x, SCALE, {"states": blocks, "read": blocks})
    assert_close(found[0], wanted[0], tolerances.FORWARD_TRITON_FP32, "out")
    assert_close(found[1], wanted[1], tolerances.FORWARD_TRITON_FP32, "end")
    names = "states", "scan_back", "gradients_qkg", "gradients_v"
    do, d_end = poisoned(torch.randn_like(wanted[0])).transpose(1, 2), torch.randn_like(wanted[1])
    grads = [
        diagonal_backward.backward(*x, do, d_end, SCALE, dict.fromkeys(names, tile))
        for tile in (whole, blocks)
    ]
    grads.append(diagonal_fused.fused_backward(*x, do, d_end, SCALE, {"fused_back": whole}))
    for i, (a, *others) in enumerate(zip(*grads, strict=True)):
        assert (a is None) == (i == 3 and gate == 0)
        for b in others:
            if a is None or b is None:
                assert a is b
            else:
                assert_close(b, a, tolerances.FORWARD_TRITON_FP32, f"gradient {i}")


def test_one_launch_where_the_manifest_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []
    for name in ("fused_backward", "backward"):
        real = getattr(recurrence, name)

        def noted(*a: Any, real: Any = real, name: str = name) -> Any:
            runs.append(name)
            return real(*a)

        monkeypatch.setattr(recurrence, name, noted)
    for d_k in (16, 128):
        call = draw(MIXERS["retention"], 5, heads=1, d_k=d_k)
        with_gradients(lambda *a: op(*a[:3], a[3][0], a[4], None, 1.0, 64, "tf32"), call)
    assert runs == ["fused_backward", "backward"]


def test_without_a_state_or_a_gate() -> None:
    call = draw(MIXERS["retention"], 20)
    linear = make("linear", {"normalise": False, "feature_map": "none", "scale": SCALE})
    out, end = op(call.q, call.k, call.v, None, None, None, SCALE, 64, "ieee")
    wanted, (state, _) = linear.parallel(call.q, call.k, call.v, ())
    assert_close(out, wanted, tolerances.FORWARD_TRITON_FP32, "out")
    assert_close(end, state, tolerances.FORWARD_TRITON_FP32, "end")


def test_the_op_is_well_formed() -> None:
    call = draw(MIXERS["retention"], 9)
    q, k, v, g, state = call.leaves()
    torch.library.opcheck(op, (q, k, v, g, state, None, SCALE, 64, "ieee"))


def test_it_survives_compilation() -> None:
    call = draw(MIXERS["gla"], 20)

    def run(q: Tensor, k: Tensor, v: Tensor, gates: Any, state: Tensor) -> Any:
        out, end = op(q * 2, k, v, gates[0], state, None, SCALE, 32, "ieee")
        return out + 1, end

    # without the C++ compiler: the graph is what can break
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    wanted, found = with_gradients(run, call), with_gradients(compiled, call)
    agree(found, wanted, torch.float32)


def test_what_no_tiles_do_is_refused() -> None:
    x = torch.zeros(1, 1, 4, 1024)
    with pytest.raises(UsageError, match="no kernel for heads of 1024"):
        op(x, x, x, None, None, None, 1.0, 64, "ieee")
