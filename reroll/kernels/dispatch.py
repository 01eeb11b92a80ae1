"""Choose what runs a token mixer: a Triton kernel, flash-linear-attention, or a form in PyTorch.

`chunk` and `step` compute what the mixer's methods of these names do. On a GPU they use the first
of `triton`, `fla` and `eager` that supports the call, and `eager` elsewhere. The reason for
rejecting a backend is logged once. `use` forces a backend, and then a rejection is an error:

    with dispatch.use("triton"):
        model(...)

The environment variable REROLL_MIXER_BACKEND does the same for a whole process. `runs` says whether
one of reroll's kernels runs an operation that is no mixer.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from reroll.errors import UsageError
from reroll.mixers import Mixer, State, compiled, packing
from reroll.rewrite.pipeline.options import nearest_name

Backend = Literal["auto", "triton", "fla", "compiled", "eager"]
Result = tuple[Tensor, State]

VARIABLE = "REROLL_MIXER_BACKEND"

log = logging.getLogger(__name__)

_forced: ContextVar[str | None] = ContextVar("backend", default=None)


@contextmanager
def use(backend: Backend) -> Iterator[None]:
    """Run mixers with this backend inside the block."""
    token = _forced.set(_known(backend))
    try:
        yield
    finally:
        _forced.reset(token)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def chosen() -> str:
    """Return the backend that was requested; `auto` if none was.

    What `torch.compile` has compiled keeps the answer of then.
    """
    return _forced.get() or _known(os.environ.get(VARIABLE, "auto"))


def chunk(
    mixer: Mixer,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Sequence[Tensor],
    state: State | None = None,
    padding: Tensor | None = None,
    segments: Tensor | None = None,
) -> Result:
    """Compute `mixer.chunk` with the chosen backend.

    Kernels take all packed sequences at once; the other forms take each as a row of its own.
    """
    name = _pick(mixer, k, v, _trains(q, k, v, *gates))
    if name == "eager":
        return mixer.chunk(q, k, v, gates, state, padding, segments)
    if name == "compiled":
        run = partial(compiled.chunk, mixer)
        if segments is None:
            return run(q, k, v, gates, state, padding)
        start = mixer.initial_state(k, v) if state is None else state
        return packing.apart(run, q, k, v, gates, start, padding, segments)
    make = _chunk_form(name, mixer)
    form = make() if segments is None else packing.in_one_row(make, segments)
    return mixer.chunk(q, k, v, gates, state, padding, form=form)


def step(
    mixer: Mixer,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Sequence[Tensor],
    state: State | None = None,
    padding: Tensor | None = None,
) -> Result:
    """Compute `mixer.step` with the chosen backend.

    There is one kernel, which has no gradient; all other cases run in eager mode.
    """
    trains = _trains(q, k, v, *gates)
    if trains or chosen() not in ("auto", "triton") or _pick(mixer, k, v, trains) != "triton":
        return mixer.step(q, k, v, gates, state, padding)
    from reroll.kernels import forms

    return mixer.step(q, k, v, gates, state, padding, form=forms.step_form(mixer))


def considers_kernels(device: torch.device) -> bool:
    """Whether `runs` can be true at all: kernels are forced, or tensors are on a GPU."""
    wanted = chosen()
    return wanted == "triton" or (wanted == "auto" and device.type == "cuda")


def runs(kernel: Literal["depth_lora", "confidence"], x: Tensor, rank: int = 0) -> bool:
    """Whether a kernel of `layers` runs on a tensor like `x`, and not PyTorch's operations.

    `rank` is that of a low-rank residual. Raises UsageError if Triton is forced and does not.
    """
    if not considers_kernels(x.device):
        return False
    reason = _missing("triton", x.device.type)
    if not reason:
        from reroll.kernels import layers

        reason = layers.rejects(kernel, x, rank)
    if reason and chosen() == "triton":
        raise _cannot("triton", reason, f"kernel {kernel}")
    if reason:
        _say("triton", f"kernel {kernel}", reason)
    return not reason


def _chunk_form(name: str, mixer: Mixer) -> Callable[..., Any]:
    """Return the function that makes the backend's form of a mixer, also for packed sequences."""
    if name == "triton":
        from reroll.kernels import forms

        return partial(forms.chunk_form, mixer)
    from reroll.kernels import fla_forms

    return partial(fla_forms.chunk_form, mixer)


def _trains(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _pick(mixer: Mixer, k: Tensor, v: Tensor, trains: bool) -> str:
    wanted: str = chosen()
    if wanted != "auto":
        reason = _rejection(wanted, mixer, k, v, trains)
        if reason:
            raise _cannot(wanted, reason, f"mixer {mixer.name}")
        return wanted
    if k.device.type != "cuda" or torch.compiler.is_compiling():
        return "eager"
    for name in ("triton", "fla"):
        reason = _rejection(name, mixer, k, v, trains)
        if not reason:
            return name
        _say(name, f"mixer {mixer.name}", reason)
    return "eager"


def _rejection(name: str, mixer: Mixer, k: Tensor, v: Tensor, trains: bool) -> str:
    """Return why a backend does not run a call; empty if it does."""
    if name in ("eager", "compiled"):
        return ""
    missing = _missing(name, k.device.type)
    if missing:
        return missing
    if name == "triton":
        from reroll.kernels import forms

        return forms.rejects(mixer, k, v, trains)
    from reroll.kernels import fla_forms

    return fla_forms.rejects(mixer, k)


@cache
def _missing(name: str, device: str) -> str:
    """Return what a backend lacks on this machine; empty if nothing."""
    try:
        import triton
    except ImportError:
        return "triton is not installed: pip install 'reroll[triton]'"
    from reroll.kernels import interpreter

    if device != "cuda" and not interpreter.active():
        return f"tensors are on {device}, and TRITON_INTERPRET is not set"
    if tuple(map(int, triton.__version__.split(".")[:3])) < (3, 7, 1):
        # triton-lang's compiler gave wrong gradients on Hopper: fla-org/flash-linear-attention#640
        return f"triton {triton.__version__} is older than 3.7.1"
    if name == "fla":
        from importlib.util import find_spec

        if find_spec("fla") is None:
            return "flash-linear-attention is not installed: pip install fla-core"
    return ""


def _cannot(backend: str, reason: str, where: str) -> UsageError:
    return UsageError(
        f"{backend} cannot run it: {reason}",
        where=where,
        hint=f"choose another backend with reroll.kernels.dispatch.use or {VARIABLE}",
    )


@cache
def _say(name: str, mixer: str, reason: str) -> None:
    log.info("%s does not run on %s: %s", mixer, name, reason)


def _known(name: str) -> str:
    if name not in get_args(Backend):
        raise UsageError(
            f"there is no backend {name!r}", hint=nearest_name(name, list(get_args(Backend)))
        )
    return name
