"""Which mixers the kernels can run: their chunk forms on a GPU, in the place of the mixer's own.

A kernel form takes what `Mixer.chunk_form` takes and gives what it gives. Which one fits a mixer is
seen from the mathematics that its class inherits, not from its name, so a new mixer on `Diagonal`
has a kernel from its first day.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from reroll.kernels import configurations
from reroll.kernels.recurrence import diagonal
from reroll.mixers import Mixer, State
from reroll.mixers.diagonal import ChannelDiagonal, Diagonal

Result = tuple[Tensor, State]
Form = Callable[[Tensor, Tensor, Tensor, tuple[Tensor, ...], State], Result]

# a kernel's products are at least so long
SHORTEST = 16
LARGEST_HEAD = 256


def chunk_form(mixer: Mixer) -> Form | None:
    """A kernel in the place of `mixer.chunk_form`, if there is one."""
    own: Any = type(mixer).chunk_form
    if own is Diagonal.chunk_form:
        return _head_decay
    if own is ChannelDiagonal.chunk_form:
        assert isinstance(mixer, ChannelDiagonal)
        size = mixer.size
        return lambda q, k, v, gates, state: _diagonal(q, k, v, gates[0], state[0], size)
    return None


def rejects(mixer: Mixer, k: Tensor, v: Tensor) -> str:
    """Why no kernel runs this; empty if one does."""
    own: Any = type(mixer).chunk_form
    gate = {Diagonal.chunk_form: 1, ChannelDiagonal.chunk_form: 2}.get(own)
    if gate is None:
        return f"there is no kernel for {mixer.name}"
    if k.dtype == torch.float64:
        return "kernels compute in fp32 or less"
    if isinstance(mixer, ChannelDiagonal) and mixer.size < SHORTEST:
        return f"with its floor of {mixer.floor} a chunk has fewer than {SHORTEST} tokens"
    features = mixer.state_shapes(k.shape[-1], v.shape[-1])[0][0]
    if max(features, v.shape[-1]) > LARGEST_HEAD:
        return f"heads are larger than {LARGEST_HEAD}"
    like = k.new_empty(0, features)
    limit = mixer.size if isinstance(mixer, ChannelDiagonal) else max(configurations.CHUNKS)
    for family in ("diagonal", "diagonal_backward"):
        if configurations.find(family, like, v, gate, precision(), limit) is None:
            return f"the manifest has no tiles of {family} without spills for these heads"
    return ""


def precision() -> str:
    """Of fp32 products, as PyTorch is told to have it: tf32 unless it is `highest`."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _head_decay(q: Tensor, k: Tensor, v: Tensor, gates: tuple[Tensor, ...], state: State) -> Result:
    return _diagonal(q, k, v, gates[0], state[0], max(configurations.CHUNKS))


def _diagonal(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, limit: int) -> Result:
    out, end = diagonal(q.flatten(1, 2), k, v, g, state, None, 1.0, limit, precision())
    grouped = out.transpose(1, 2)
    return torch.unflatten(grouped, 1, (k.shape[1], -1)), (end,)
