"""The mixers against the naive references of flash-linear-attention.

Its package asks for Triton, so the files of its references, which need torch and einops alone, are
loaded by their path.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from reroll.mixers import make
from reroll.mixers.delta_form import unit
from tests.conformance.mixer_suite import assert_close
from tests.mixers.test_oracles import TOLERANCE, agree, by_time, inputs_of

SMALL = {"chunk_size": 16}


def reference(name: str) -> ModuleType:
    """The module `fla/ops/<name>.py`."""
    found = importlib.util.find_spec("fla")
    if found is None or not found.submodule_search_locations:
        pytest.skip("flash-linear-attention is not there: pip install --no-deps fla-core einops")
    path = Path(found.submodule_search_locations[0]) / "ops" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name.replace("/", "_"), path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_retention() -> None:
    mixer = make("retention", SMALL)
    x = inputs_of(mixer)
    out, state = reference("simple_gla/naive").naive_recurrent_simple_gla(
        *by_time(x.q, x.k, x.v, *x.gates), initial_state=x.state[0]
    )
    agree(mixer, x, out, state)


def test_gla() -> None:
    mixer = make("gla", SMALL)
    x = inputs_of(mixer)
    out, state = reference("gla/naive").naive_recurrent_gla(
        *by_time(x.q, x.k, x.v, *x.gates), initial_state=x.state[0], output_final_state=True
    )
    agree(mixer, x, out, state)


def test_hgrn2() -> None:
    mixer = make("hgrn2", SMALL | {"floor": -20.0})
    x = inputs_of(mixer)
    out, state = reference("gla/naive").naive_recurrent_gla(
        *by_time(x.q, 1 - x.gates[0].exp(), x.v, *x.gates),
        initial_state=x.state[0], output_final_state=True,
    )  # fmt: skip
    agree(mixer, x, out, state)


def test_gsa() -> None:
    mixer = make("gsa", SMALL | {"slots": 7})
    x = inputs_of(mixer)
    q, k, v, g = by_time(x.q, x.k, x.v, *x.gates)
    out, (keys, values) = reference("gsa/naive").naive_recurrent_gsa(
        q, k, v, 1 - g.exp(), g, scale=1.0,
        initial_state=(x.state[0].mT, x.state[1]), output_final_state=True,
    )  # fmt: skip
    agree(mixer, x, out, keys.mT, values)


def test_rwkv6() -> None:
    mixer = make("rwkv6", SMALL | {"floor": -20.0})
    x = inputs_of(mixer)
    bonus = torch.randn(2, 6)
    x = x._replace(gates=(x.gates[0], bonus[:, None].expand_as(x.gates[1])))
    out, state = reference("rwkv6/recurrent_naive").naive_recurrent_rwkv6(
        x.q, x.k, x.v, x.gates[0], bonus, scale=1.0,
        initial_state=x.state[0], output_final_state=True,
    )  # fmt: skip
    agree(mixer, x, out.transpose(1, 2), state)


@pytest.mark.parametrize("negative", [False, True])
def test_deltanet(negative: bool) -> None:
    mixer = make("deltanet", SMALL | {"negative": negative})
    x = inputs_of(mixer)
    out, state = reference("delta_rule/naive").delta_rule_recurrence(
        unit(x.q), unit(x.k), x.v, *x.gates, initial_state=x.state[0]
    )
    agree(mixer, x, out.transpose(1, 2), state)


def test_kda() -> None:
    mixer = make("kda", SMALL)
    x = inputs_of(mixer)
    out, state = reference("kda/naive").naive_recurrent_kda(
        *by_time(unit(x.q), unit(x.k), x.v, *x.gates),
        initial_state=x.state[0], output_final_state=True,
    )  # fmt: skip
    agree(mixer, x, out, state)


@pytest.mark.parametrize("steps", [2, 3])
def test_deltaproduct(steps: int) -> None:
    mixer = make("deltaproduct", SMALL | {"steps": steps})
    x = inputs_of(mixer)
    log_decay, beta, keys, values = x.gates
    k, v = torch.cat([x.k[:, :, :, None], keys], 3), torch.cat([x.v[:, :, :, None], values], 3)
    every = by_time(*(t.flatten(2, 3) for t in (unit(k), v, beta)))
    q, g = by_time(unit(x.q), log_decay)
    out, state = reference("gated_delta_product/naive").naive_recurrent_gated_delta_product(
        q, *every[:2], g, every[2], 6**-0.5,
        initial_state=x.state[0], output_final_state=True, num_householder=steps,
    )  # fmt: skip
    agree(mixer, x, out, state)


def test_linear() -> None:
    mixer = make("linear", SMALL | {"feature_map": "taylor"})
    x = inputs_of(mixer)
    out, _ = mixer.chunk(x.q, x.k, x.v, ())
    # Based's reference divides by the sum of weights, and scales queries by d^-1/2 itself
    wanted = reference("based/naive").naive_parallel_based(x.q, x.k, x.v)
    assert_close(out, wanted.transpose(1, 2), TOLERANCE, "taylor features")
