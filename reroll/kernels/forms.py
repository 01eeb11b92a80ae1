"""Chunk and step forms that run kernels on a GPU, in place of a mixer's own.

A kernel form has the arguments and results of `Mixer.chunk_form`. It is chosen by the core that a
mixer declares, not by its name. So a new mixer on `Diagonal` has a kernel without further work.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from reroll.kernels import configurations
from reroll.kernels.recurrence import BACKWARDS, delta, diagonal, selective, step
from reroll.mixers import Mixer, State
from reroll.mixers.core import Core

Result = tuple[Tensor, State]
Gates = tuple[Tensor, ...]
Form = Callable[[Tensor, Tensor, Tensor, Gates, State], Result]

# a matrix product of a kernel is over at least this many tokens
SHORTEST = 16
LARGEST_HEAD = 256


def chunk_form(mixer: Mixer, starts: Tensor | None = None) -> Form:
    """Return a kernel in place of `mixer.chunk_form`; `rejects` says whether there is one.

    With `starts` [sequences + 1], int32, the row of a batch of 1 packs sequences that begin there.
    """
    core, limit = _core(mixer), limit_of(mixer)
    if core.decay == "selective":
        return _selective(starts)

    def form(q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State) -> Result:
        g, x = gates[0] if core.gate else None, (q.flatten(1, 2), k, v)
        if core.delta:
            out, end = delta(*x, g, gates[-1], state[0], starts, 1.0, limit, precision())
        else:
            out, end = diagonal(*x, g, state[0], starts, 1.0, limit, precision())
        return torch.unflatten(out.transpose(1, 2), 1, (k.shape[1], -1)), (end,)

    return form


def step_form(mixer: Mixer) -> Form:
    """Return a kernel in place of `mixer.step_form`, for the same mixers."""
    core = _core(mixer)
    if core.decay == "selective":
        return _selective_step

    def form(q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State) -> Result:
        g, beta = gates[0] if core.gate else None, gates[-1] if core.delta else None
        out, new = step(q.flatten(1, 2), k, v, g, beta, state[0])
        return torch.unflatten(out, 1, (k.shape[1], -1)), (new,)

    return form


def _selective(starts: Tensor | None = None) -> Form:
    """Return the scan of a state of which each number decays by itself."""

    def form(q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State) -> Result:
        out, end = selective(q.flatten(1, 2), k, v, *gates, state[0], starts)
        return torch.unflatten(out.transpose(1, 2), 1, (k.shape[1], -1)), (end,)

    return form


def _selective_step(q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State) -> Result:
    """Scan one token: every tensor is without its time dimension."""
    now = tuple(g.unsqueeze(2) for g in gates)
    out, end = _selective()(q.unsqueeze(3), k.unsqueeze(2), v.unsqueeze(2), now, state)
    return out.squeeze(3), end


def limit_of(mixer: Mixer) -> int:
    """Return the largest number of tokens in a chunk."""
    return mixer.longest_chunk or max(configurations.CHUNKS)


def _core(mixer: Mixer) -> Core:
    core = mixer.core
    assert core is not None
    return core


def rejects(mixer: Mixer, k: Tensor, v: Tensor, needs_gradient: bool = False) -> str:
    """Return why no kernel runs a mixer on such keys and values; empty if one does."""
    core = mixer.core
    if core is None or core.counts or (core.gate == 0 and not core.delta):
        return f"there is no kernel for {mixer.name}"
    family, gate = core.family, core.gate
    if k.dtype == torch.float64:
        return "kernels compute in fp32 or less"
    if family == "selective":
        return _rejects_selective(k)
    limit = limit_of(mixer)
    if gate == 2 and limit < SHORTEST:
        return f"with its floor a chunk has fewer than {SHORTEST} tokens"
    if family == "delta" and needs_gradient:
        return "the delta rule has no backward here; flash-linear-attention has one"
    features = mixer.state_shapes(k.shape[-1], v.shape[-1])[0][0]
    if max(features, v.shape[-1]) > LARGEST_HEAD:
        return f"heads are larger than {LARGEST_HEAD}"
    like = k.new_empty(0, features)
    # in each tuple, at least one family must have tiles
    used: list[tuple[str, ...]] = [(family,), ("step",)] + [BACKWARDS] * needs_gradient
    for names in used:
        tiles = (configurations.find_tiles(n, like, v, gate, precision(), limit) for n in names)
        if not any(tiles):
            return f"the manifest has no tiles of {names[-1]} without spills for these heads"
    return ""


def _rejects_selective(k: Tensor) -> str:
    if not configurations.selective_tiles(configurations.target(k.device), k.shape[-1]):
        return f"the manifest has no tiles of selective without spills for {k.shape[-1]} rows"
    return ""


def precision() -> str:
    """Return PyTorch's setting for fp32 products: ieee if it is `highest`, else tf32."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
