"""Chunk forms of flash-linear-attention, for mixers that it supports: 0.6 or newer, on a GPU.

Its tensors are [batch, time, heads, size] with as many key heads as query heads, so shared ones are
repeated. It also has a backward of the gated delta rule, for which reroll has no kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from reroll.mixers import Mixer, State

Form = Callable[[Tensor, Tensor, Tensor, tuple[Tensor, ...], State], tuple[Tensor, State]]

# module and function by the core of a mixer: family and gate
_OPS = {
    ("diagonal", 1): ("fla.ops.simple_gla", "chunk_simple_gla"),
    ("diagonal", 2): ("fla.ops.gla", "chunk_gla"),
    ("delta", 1): ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule"),
}


def _op(mixer: Mixer) -> tuple[str, str] | None:
    core = mixer.core
    return None if core is None else _OPS.get((core.family, core.gate))


def rejects(mixer: Mixer, k: Tensor) -> str:
    """Return why it does not run a mixer on such keys; empty if it does."""
    if _op(mixer) is None:
        return f"it has no {mixer.name}"
    if k.dtype == torch.float64:
        return "it computes in fp32 or less"
    return ""


def chunk_form(mixer: Mixer, starts: Tensor | None = None) -> Form:
    """Return its function in place of `mixer.chunk_form`; `starts` is as in `forms.chunk_form`."""
    from importlib import import_module

    module_and_name = _op(mixer)
    assert module_and_name is not None
    module, name = module_and_name
    op: Any = getattr(import_module(module), name)

    def form(
        q: Tensor, k: Tensor, v: Tensor, gates: tuple[Tensor, ...], state: State
    ) -> tuple[Tensor, State]:
        groups = q.shape[2]

        def heads(x: Tensor) -> Tensor:
            return x.repeat_interleave(groups, 1).transpose(1, 2).contiguous()

        decay, *rest = map(heads, gates)
        out, end = op(
            q.flatten(1, 2).transpose(1, 2).contiguous(), heads(k), heads(v), g=decay,
            **({"beta": rest[0]} if rest else {}), scale=1.0,
            initial_state=state[0].repeat_interleave(groups, 1), output_final_state=True,
            cu_seqlens=None if starts is None else starts.long(),
        )  # fmt: skip
        # query heads that share keys have equal states
        shared = end.unflatten(1, (-1, groups)).mean(2)
        return torch.unflatten(out.transpose(1, 2), 1, (k.shape[1], groups)), (shared,)

    return form
