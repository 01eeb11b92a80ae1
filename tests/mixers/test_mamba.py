"""The selective scan against transformers' function of it, at any decay, and what it holds."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from inspect import unwrap
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.mamba.modeling_mamba import mamba_selective_scan

from reroll.errors import PassError, UsageError
from reroll.mixers import compiled, make
from reroll.rewrite.pipeline.manager import run_passes
from tests.captured import captured
from tests.conformance.mixer_suite import assert_close

BATCH, TIME, STATE, INNER = 2, 40, 4, 6
MIXER = make("mamba", {"chunk_size": 16})
FORMS = ("parallel", "chunk", "recur")
# relative error of two fp32 or fp64 computations
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def drawn(dtype: torch.dtype, steps: float = 1.0, time: int = TIME) -> list[Tensor]:
    """x, dt, A, B and C as transformers has them: [batch, inner or state, time], [inner, state]."""
    seed = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=seed)

    dt = torch.nn.functional.softplus(random(BATCH, INNER, time)) * steps
    rest = (random(BATCH, n, time) for n in (INNER, STATE, STATE))
    x, b, c = rest
    return [t.to(dtype) for t in (x, dt, -random(INNER, STATE).exp(), b, c)]


def oracle(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Out [batch, time, inner] and the last state [batch, state, inner]."""
    # `unwrap`: transformers would call the kernels of other packages where these are installed.
    # It rounds x and B to fp32, and their gradients; here it computes in fp64 what is in fp64
    with patch.object(Tensor, "float", lambda t: t):
        out, state = unwrap(mamba_selective_scan)(x, dt, a, b, c, return_last_state=True)
    return out.mT, state.mT


def ours(form: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor]]:
    def run(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, dt = (t.mT.unsqueeze(1) for t in (c, b, x, dt))
        out, (state,) = form(q, k, v, (dt, a.mT[None, None, None]))
        return out[:, :, 0], state[:, 0]

    return run


def with_gradients(run: Callable[..., Any], inputs: list[Tensor]) -> dict[str, Tensor]:
    leaves = [t.clone().requires_grad_() for t in inputs]
    out, state = run(*leaves)
    seed = torch.Generator().manual_seed(1)
    loss = sum((t * torch.randn(t.shape, generator=seed)).sum() for t in (out, state))
    grads = torch.autograd.grad(loss, leaves)
    return {"out": out, "state": state} | dict(zip(("x", "dt", "A", "B", "C"), grads, strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_it_is_the_scan_of_transformers(form: str, dtype: torch.dtype) -> None:
    inputs = drawn(dtype)
    wanted = with_gradients(oracle, inputs)
    for key, value in with_gradients(ours(getattr(MIXER, form)), inputs).items():
        assert value.dtype == dtype
        assert_close(value, wanted[key], TOLERANCE[dtype], key)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_any_decay_is_exact(form: str, dtype: torch.dtype) -> None:
    """Tokens that keep nothing between tokens that keep nearly all: no sum of logs is rounded."""
    inputs = drawn(dtype, steps=0.01)
    # logs of decays down to about -1e7, which is 0 in any dtype, and some near -50 and -100
    inputs[1][:, :, ::7], inputs[1][:, :, 3::9] = 1e6, 50.0
    log_decays = inputs[1][:, :, None] * inputs[2][..., None]
    assert log_decays.min() < -1e6
    assert ((log_decays < -50) & (log_decays > -100)).any()
    assert (log_decays > -0.01).any()
    wide = [t.double() for t in inputs]
    wanted = with_gradients(oracle, wide)
    for key, value in with_gradients(ours(getattr(MIXER, form)), inputs).items():
        assert_close(value.double(), wanted[key], TOLERANCE[dtype], key)


def test_tokens_between_steps_without_end_are_right_one_by_one() -> None:
    """The error of each token, not of all: a large one would hide the others."""
    inputs = drawn(torch.float32, steps=0.01)
    inputs[1][:, :, ::7] = 1e6
    # the tokens of large steps write much, so they are told to write nothing
    inputs[0][:, :, ::7] = 0.0
    wanted, _ = oracle(*(t.double() for t in inputs))
    for form in FORMS:
        out, _ = ours(getattr(MIXER, form))(*inputs)
        for t in range(TIME):
            assert_close(out[:, t].double(), wanted[:, t], 1e-5, f"{form}: token {t}")


class Largest(TorchDispatchMode):
    """Notes the most numbers that one tensor has storage for."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                size = tensor.untyped_storage().nbytes() // tensor.itemsize
                self.numbers = max(self.numbers, size)
        return out


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("trains", [False, True])
def test_no_tensor_has_the_states_of_all_tokens(trains: bool, padded: bool) -> None:
    size, time = 8, 160
    mixer = make("mamba", {"chunk_size": size})
    inputs = [t.requires_grad_(trains) for t in drawn(torch.float32, time=time)]
    padding = torch.ones(BATCH, time)
    padding[0, :5] = 0
    with Largest() as seen:
        run = ours(lambda *a: mixer.chunk(*a, padding=padding if padded else None))
        out, _ = run(*inputs)
        if trains:
            out.sum().backward()
    assert seen.numbers <= max(BATCH * size * STATE * INNER, BATCH * time * INNER)


def test_training_keeps_the_states_of_chunks_alone() -> None:
    size, time = 8, 160
    mixer = make("mamba", {"chunk_size": size})
    inputs = [t.requires_grad_() for t in drawn(torch.float32, time=time)]
    storages: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // 4
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        ours(mixer.chunk)(*inputs)
    assert 0 < sum(storages.values()) < BATCH * time * STATE * INNER


def test_a_gate_that_is_not_constant_has_all_tokens() -> None:
    x, dt, a, b, c = drawn(torch.float32)
    q, k, v = (t.mT.unsqueeze(1) for t in (c, b, x))
    with pytest.raises(UsageError, match=r"gate dt is \(1, 1, 1, 6\), not \(2, 1, 40, 6\)"):
        MIXER.chunk(q, k, v, (dt.mT[:1, None, :1], a.mT[None, None, None]))


# ---- in a model that was attention


@pytest.fixture(scope="module")
def linearized() -> Any:
    return run_passes(captured("llama"), "linearize(mixer=mamba, window=0)", measure=False)


def test_rates_are_weights_and_step_sizes_are_projected(linearized: Any) -> None:
    names = {n.rpartition("mixer.")[2] for n in linearized.weights if "mixer." in n}
    assert names >= {"rate", "dt_down.weight", "dt_up.weight", "dt_up.bias"}
    assert not any(n.startswith("rate_") for n in names)


def test_it_starts_with_the_half_lives_of_its_heads(linearized: Any) -> None:
    module = linearized.to_module()
    state = {n.rpartition("layers.0.")[2]: t for n, t in module.state_dict().items()}
    names = "dt_up.bias", ".rate"
    raws = (next(t for n, t in state.items() if n.endswith(name)) for name in names)
    steps, rates = (
        gate.activation(raw).unflatten(0, (2, -1)).mean(1)
        for gate, raw in zip(make("mamba").gates(8, 8), raws, strict=True)
    )
    decay = steps * rates
    for head, life in enumerate((32.0, 512.0)):
        assert math.isclose(decay[head], -math.log(2) / life, rel_tol=1e-4)


def test_liger_has_no_such_gates() -> None:
    with pytest.raises(PassError, match="Liger has no gate dt for the mixer mamba") as error:
        run_passes(captured("llama"), "linearize(mixer=mamba, gates=liger)", measure=False)
    assert "gates=learned" in error.value.hint


def test_pieces_are_given_its_rates_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "PIECE", 16)
    monkeypatch.setattr(compiled, "SHORTEST", 4)
    seen = []

    def run(q: Tensor, k: Tensor, v: Tensor, gates: Any, *rest: Any) -> Any:
        seen.append(gates[1].shape[2])
        return MIXER.chunk(q, k, v, gates, *rest)

    monkeypatch.setattr(compiled, "_compiled", lambda mixer: run)
    for time, rows in ((TIME, BATCH), (1, 1)):
        inputs = [t if t.dim() == 2 else t[:rows] for t in drawn(torch.float32, time=time)]
        wanted = ours(MIXER.chunk)(*inputs)
        for a, b in zip(ours(partial(compiled.chunk, MIXER))(*inputs), wanted, strict=True):
            assert_close(a, b, 1e-6, f"{time} tokens")
    assert seen == [1] * 4
