"""Which mixers the kernels can run: chunk and step forms on a GPU, in the place of the mixer's.

A kernel form takes what `Mixer.chunk_form` takes and gives what it gives. Which one fits a mixer is
told by the core that it declares, not by its name: a new mixer on `Diagonal` has a kernel from its
first day.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from reroll.kernels import configurations
from reroll.kernels.recurrence import BACKWARDS, delta, diagonal, step
from reroll.mixers import Mixer, State
from reroll.mixers.core import Core

Result = tuple[Tensor, State]
Gates = tuple[Tensor, ...]
Form = Callable[[Tensor, Tensor, Tensor, Gates, State], Result]

# a kernel's products are at least so long
SHORTEST = 16
LARGEST_HEAD = 256


def chunk_form(mixer: Mixer, starts: Tensor | None = None) -> Form:
    """A kernel in the place of `mixer.chunk_form`; `rejects` says whether there is one.

    With `starts` [sequences + 1], int32, a batch of 1 is packed sequences that begin there.
    """
    core, limit = _core(mixer), limit_of(mixer)

    def form(q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State) -> Result:
        g, x = gates[0] if core.gate else None, (q.flatten(1, 2), k, v)
        if core.delta:
            out, end = delta(*x, g, gates[-1], state[0], starts, 1.0, limit, precision())
        else:
            out, end = diagonal(*x, g, state[0], starts, 1.0, limit, precision())
        return torch.unflatten(out.transpose(1, 2), 1, (k.shape[1], -1)), (end,)

    return form


def step_form(mixer: Mixer) -> Form:
    """A kernel in the place of `mixer.step_form`, for the same mixers."""
    core = _core(mixer)

    def form(q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State) -> Result:
        g, beta = gates[0] if core.gate else None, gates[-1] if core.delta else None
        out, new = step(q.flatten(1, 2), k, v, g, beta, state[0])
        return torch.unflatten(out, 1, (k.shape[1], -1)), (new,)

    return form


def limit_of(mixer: Mixer) -> int:
    """The most tokens that one chunk may have."""
    return mixer.longest_chunk or max(configurations.CHUNKS)


def _core(mixer: Mixer) -> Core:
    core = mixer.core
    assert core is not None
    return core


def rejects(mixer: Mixer, k: Tensor, v: Tensor, needs_gradient: bool = False) -> str:
    """Why no kernel runs this; empty if one does."""
    core = mixer.core
    if core is None or core.counts or (core.gate == 0 and not core.delta):
        return f"there is no kernel for {mixer.name}"
    family, gate = core.family, core.gate
    if k.dtype == torch.float64:
        return "kernels compute in fp32 or less"
    limit = limit_of(mixer)
    if gate == 2 and limit < SHORTEST:
        return f"with its floor a chunk has fewer than {SHORTEST} tokens"
    if family == "delta" and needs_gradient:
        return "the delta rule has no backward here; flash-linear-attention has one"
    features = mixer.state_shapes(k.shape[-1], v.shape[-1])[0][0]
    if max(features, v.shape[-1]) > LARGEST_HEAD:
        return f"heads are larger than {LARGEST_HEAD}"
    like = k.new_empty(0, features)
    # of each, one must have tiles
    used: list[tuple[str, ...]] = [(family,), ("step",)] + [BACKWARDS] * needs_gradient
    for names in used:
        found = (configurations.find(n, like, v, gate, precision(), limit) for n in names)
        if not any(found):
            return f"the manifest has no tiles of {names[-1]} without spills for these heads"
    return ""


def precision() -> str:
    """Of fp32 products, as PyTorch is told to have it: tf32 unless it is `highest`."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
