"""Compile the chunk form by `torch.compile`, once for all layers that have the same mixer.

A sequence is run in pieces of a fixed length, and the last piece is padded to a power of two, which
changes nothing. So a few compiled graphs serve every length, and their buffers stay in the
processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reroll.mixers.base import Mixer, Result, State
from reroll.mixers.gates import given_once

PIECE = 1024
SHORTEST = 64
# most compiled graphs of one mixer: per length of the last piece, padding and gradients
GRAPHS = 64


def chunk(
    mixer: Mixer,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Sequence[Tensor],
    state: State | None = None,
    padding: Tensor | None = None,
) -> Result:
    """Compute `mixer.chunk` in compiled pieces."""
    time, run = k.shape[2], _compiled(mixer)
    state = mixer.initial_state(k, v) if state is None else state
    declared, outs = mixer.gates(k.shape[-1], v.shape[-1]), []
    fixed = [gate.constant and given_once(g) for gate, g in zip(declared, gates, strict=True)]
    fixed = [False] * 3 + fixed
    with torch._dynamo.config.patch(recompile_limit=GRAPHS):
        for start in range(0, time, PIECE):
            now, length = slice(start, start + PIECE), min(PIECE, time - start)
            full = max(SHORTEST, 1 << (length - 1).bit_length())
            mask = None if padding is None else padding[:, now]
            if mask is None and full > length:
                mask = k.new_ones(k.shape[0], length)
            # equal strides for all pieces, so that one graph serves them
            q_now, k_now, v_now, *rest = (
                x if once else _filled(x[:, :, now], full).contiguous()
                for x, once in zip((q, k, v, *gates), fixed, strict=True)
            )
            if mask is not None:
                mask = F.pad(mask, (0, full - length)).contiguous()
            before = tuple(s.contiguous() for s in state)
            out, state = run(q_now, k_now, v_now, rest, before, mask)
            outs.append(out[:, :length].transpose(1, 2))
    # concatenated with heads first, so that each head of a piece is copied as one block
    return torch.cat(outs, 2).transpose(1, 2), state


def _filled(x: Tensor, length: int) -> Tensor:
    """Pad time with zeros up to a length."""
    missing = length - x.shape[2]
    return F.pad(x, (0, 0) * (x.dim() - 3) + (0, missing)) if missing else x


@lru_cache(maxsize=64)
def _compiled(mixer: Mixer) -> Callable[..., Any]:
    # equal mixers are one cache key, so layers share compiled graphs
    def run(*arguments: Any) -> Result:
        return mixer.chunk(*arguments)

    # the compiler counts its graphs by code object, so each mixer gets one of its own
    code = run.__code__.replace(co_name=f"chunk_{mixer.name}")
    return torch.compile(FunctionType(code, globals(), closure=run.__closure__), dynamic=False)
