"""The mixers against other people's code for the same mathematics, on the same tensors."""

from __future__ import annotations

from inspect import unwrap

import torch
from torch import Tensor
from transformers.models.kimi_linear.modeling_kimi_linear import recurrent_kimi_delta_attention
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
from transformers.models.qwen3_next.modeling_qwen3_next import (
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)
from transformers.models.xlstm import modeling_xlstm

from reroll.mixers import Mixer, make
from tests.conformance.mixer_suite import Inputs, assert_close, draw

TOLERANCE = 1e-5

# `unwrap`: transformers would call the kernels of other packages where these are installed


def inputs_of(mixer: Mixer) -> Inputs:
    """In fp32, with as many heads as key-value heads, which is what the oracles have."""
    return draw(mixer, torch.float32, time=40, heads=2)


def by_time(*tensors: Tensor) -> list[Tensor]:
    """[batch, heads, time, ...] to [batch, time, heads, ...]."""
    return [t.transpose(1, 2) for t in tensors]


def agree(mixer: Mixer, inputs: Inputs, out: Tensor, *state: Tensor) -> None:
    """All three forms give `out` [batch, time, heads, d_v] and the state."""
    for form in (mixer.parallel, mixer.chunk, mixer.recur):
        found, end = form(*inputs)
        assert_close(found, out, TOLERANCE, f"{form.__name__}: out")
        for i, (a, b) in enumerate(zip(end, state, strict=True)):
            assert_close(a, b, TOLERANCE, f"{form.__name__}: state {i}")


def test_gated_deltanet_is_that_of_qwen3_next() -> None:
    mixer = make("gated_deltanet", {"chunk_size": 16})
    inputs = inputs_of(mixer)
    for oracle in (torch_chunk_gated_delta_rule, torch_recurrent_gated_delta_rule):
        out, state = unwrap(oracle)(
            *by_time(inputs.q, inputs.k, inputs.v, *inputs.gates),
            initial_state=inputs.state[0],
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        agree(mixer, inputs, out, state)


def test_kda_is_that_of_kimi_linear() -> None:
    mixer = make("kda", {"chunk_size": 16})
    inputs = inputs_of(mixer)
    out, state = unwrap(recurrent_kimi_delta_attention)(
        *by_time(inputs.q, inputs.k, inputs.v, *inputs.gates),
        inputs.state[0],
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    agree(mixer, inputs, out, state)


def test_mamba2_is_that_of_transformers() -> None:
    mixer = make("mamba2", {"chunk_size": 16})
    inputs = inputs_of(mixer)
    # its decay is made of the step size and one rate for each head
    rate, dt = -torch.rand(2), inputs.gates[1]
    inputs = inputs._replace(gates=(rate[:, None] * dt, dt))
    q, k, v, step = by_time(inputs.q, inputs.k, inputs.v, dt)
    out, state = unwrap(mamba2_chunk_scan)(
        v, step, rate, k, q, chunk_size=16,
        initial_states=inputs.state[0].mT, return_final_states=True,
    )  # fmt: skip
    agree(mixer, inputs, out, state.mT)


def test_mlstm_is_that_of_xlstm() -> None:
    mixer = make("mlstm", {"chunk_size": 16})
    inputs = inputs_of(mixer)
    raw = torch.randn_like(inputs.gates[0])
    inputs = inputs._replace(gates=(torch.nn.functional.logsigmoid(raw), 3 * inputs.gates[1]))
    c, n, m = inputs.state
    out, (c, n, m) = modeling_xlstm.mlstm_recurrent_sequence_native(
        inputs.q, inputs.k, inputs.v, inputs.gates[1], raw,
        c_initial=c, n_initial=n, m_initial=m[..., None], return_last_states=True,
    )  # fmt: skip
    agree(mixer, inputs, out.transpose(1, 2), c, n, m[..., 0])
