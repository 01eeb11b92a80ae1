"""The recurrences of transformers' models: their functions as ops, their states as state of ops.

transformers calls every scan and delta rule by a function of the model's module, under one
decorator (`use_kernel_func_from_hub_with_fallback`), which names it. Inside `recurrences`, a model
finds functions here that make one `reroll::recurrence` node each, whose rule is transformers' own
function. Raising makes the node of a mixer of it. Short convolutions become one
`reroll::short_convolution` node. Where a model computes one by code of its own, its state alone is
an op, `reroll::recent`, which a cache layer of the capture makes.
"""

from __future__ import annotations

import inspect
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from reroll.errors import CaptureError
from reroll.rewrite.capture.keywords import refuse_unmodelled
from reroll.rewrite.ir.ops import recent, recurrence, short_convolution
from reroll.rewrite.ir.rules import register_rule

# the rules of flat Programs: those of functions of transformers
PREFIX = "transformers."
# the attribute of the inputs of a convolution: the new ones alone
_NEW = "new_inputs"


@contextmanager
def recurrences(model: nn.Module) -> Iterator[None]:
    """Let a model's functions of recurrences be ops; restore its modules afterwards."""
    modules = {sys.modules[type(each).__module__] for each in model.modules()}
    replaced = []
    try:
        for module in modules:
            for attribute, value in list(vars(module).items()):
                name, function = _named(value)
                if name in _RECURRENCES:
                    register_rule(PREFIX + name, _Original(name, function))
                    other: Any = partial(_RECURRENCES[name], PREFIX + name)
                elif name == "causal_conv1d_fn":
                    other = _short_convolution
                elif name == "apply_mask_to_padding_states":
                    other = partial(_without_padding, value)
                else:
                    continue
                replaced.append((module, attribute, value))
                setattr(module, attribute, other)
        yield
    finally:
        for module, attribute, value in replaced:
            setattr(module, attribute, value)


def _named(value: Any) -> tuple[str, Any]:
    """Return the name of a function under the decorator, and the function of PyTorch below.

    A function without the decorator has its own name; anything else has none.
    """
    if not inspect.isfunction(value):
        return "", None
    outer = inspect.getclosurevars(value).nonlocals if hasattr(value, "__wrapped__") else {}
    return str(outer.get("func_name", value.__name__)), outer.get("torch_function", value)


# ---- functions that models call, which make one node


def _delta_rule(
    rule: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **others: Any,
) -> tuple[Tensor, KeptState]:
    """Compute `chunk_gated_delta_rule` or `chunk_kda`; all are [batch, time, heads, ...]."""
    _refuse(rule, initial_state=initial_state, **others)
    options = {"chunk_size": chunk_size, "use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel}
    q, k, v, g, beta = (_heads_first(x) for x in (query, key, value, g, beta))
    q, k = (_repeated(x, v.shape[1]) for x in (q, k))
    out = recurrence(q, k, v, [g, beta], rule, json.dumps(options))
    return out, KeptState()


def _state_space(
    rule: str,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **others: Any,
) -> Tensor | tuple[Tensor, KeptState]:
    """Compute `mamba_chunk_scan_combined`; the step sizes and the skip are ordinary operations."""
    _refuse(rule, initial_states=initial_states, **others)
    dt = _step_sizes(dt, dt_bias, dt_softplus)
    dt = torch.clamp(dt, min=dt_limit[0], max=dt_limit[1])
    x, b, c = (_heads_first(t.float()) for t in (hidden_states, B, C))
    b, c = (_repeated(t, x.shape[1]) for t in (b, c))
    dt = _heads_first(dt)
    # [1, heads, 1]: the same for all tokens
    decay = A.float()[None, :, None]
    out = recurrence(c, b, x, [decay, dt], rule, json.dumps({"chunk_size": chunk_size}))
    if D is not None:
        out = out + D[..., None] * hidden_states.float()
    if not return_final_states:
        return out  # type: ignore[no-any-return]
    return out, KeptState()


def _selective_scan(
    rule: str,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    use_mambapy: bool = False,
    use_associative_scan: bool = False,
    **others: Any,
) -> Tensor | tuple[Tensor, KeptState]:
    """Compute `selective_scan_fn`; hidden_states, dt and z are [batch, channels, time].

    All channels are one head, with keys `B` and queries `C` [batch, states, time].
    """
    _refuse(rule, **others)
    bias = None if delta_bias is None else delta_bias[..., None]
    dt = _step_sizes(dt, bias, delta_softplus)
    x, dt, b, c = (t.transpose(1, 2).unsqueeze(1) for t in (hidden_states, dt, B, C))
    out = recurrence(c, b, x, [dt, A[None, None, None]], rule, "{}")
    out = out.squeeze(2).transpose(1, 2)
    if D is not None:
        out = out + hidden_states * D[None, :, None]
    if z is not None:
        out = out * nn.functional.silu(z)
    if not return_last_state:
        return out  # type: ignore[no-any-return]
    return out, KeptState()


def _short_convolution(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    seq_idx: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Compute `causal_conv1d_fn`; its input may be what a cache layer of the capture returned."""
    from transformers.activations import ACT2FN

    _refuse("causal_conv1d_fn", "reroll::short_convolution", seq_idx=seq_idx)
    new = getattr(hidden_states, _NEW, hidden_states)
    out = short_convolution(new.to(weight.dtype), weight, bias)
    if activation is not None:
        out = ACT2FN[activation](out)
    return out.to(new.dtype)  # type: ignore[no-any-return]


def _without_padding(
    function: Callable[..., Tensor], hidden_states: Tensor, attention_mask: Tensor | None
) -> Tensor:
    """Compute `apply_mask_to_padding_states` for a mask that may have past tokens as well.

    Mamba takes a mask of its prompt, and none behind it, where all tokens count.
    """
    if attention_mask is not None:
        attention_mask = of_new_tokens(attention_mask, hidden_states.shape[1])
    return function(hidden_states, attention_mask)


def of_new_tokens(mask: Tensor, time: int) -> Tensor:
    """Return the last `time` columns of a padding mask [batch, past and new tokens].

    A slice, as transformers takes one, has other strides without a past than with one, which the
    export would tell apart.
    """
    total = mask.shape[1]
    if statically_known_true(total == time):
        return mask
    columns = torch.arange(time, device=mask.device) + (total - time)
    return mask.index_select(1, columns)


def with_last_inputs(x: Tensor, kept: int) -> Tensor:
    """Put the last `kept` inputs of a convolution before its new ones [batch, channels, time].

    A function that has the convolution as one op takes the new ones out of the result again.
    """
    whole: Tensor = recent(x, kept)
    setattr(whole, _NEW, x)
    return whole


_RECURRENCES: dict[str, Callable[..., Any]] = {
    "chunk_kda": _delta_rule,
    "selective_scan_fn": _selective_scan,
    "chunk_gated_delta_rule": _delta_rule,
    "mamba_chunk_scan_combined": _state_space,
}


def _refuse(rule: str, op: str = "reroll::recurrence", **keywords: Any) -> None:
    refuse_unmodelled(rule.removeprefix(PREFIX), op, keywords, None)


def _step_sizes(dt: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    """Return step sizes of what a projection gives."""
    if bias is not None:
        dt = dt + bias.to(dt.dtype)
    return nn.functional.softplus(dt) if softplus else dt


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def _repeated(x: Tensor, heads: int) -> Tensor:
    """Repeat each head [batch, heads, time, dim], as `repeat_interleave` does."""
    times = heads // x.shape[1]
    if times == 1:
        return x
    return x.unsqueeze(2).expand(-1, -1, times, -1, -1).flatten(1, 2)


class KeptState:
    """What stands for a state after the last token, which a recurrence's op keeps itself.

    A cache is given it, perhaps converted, or stacked with those of other heads. A model that
    computes anything else of it is refused.
    """

    def to(self, *_: Any, **__: Any) -> KeptState:
        return self

    float = contiguous = to

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> KeptState:
        if function in (torch.stack, torch.cat):
            return cls()
        raise CaptureError(
            f"it computes with the state of its recurrence ({function.__name__}), which is not "
            "captured"
        )


# ---- rules of flat Programs


class _Original:
    """A rule that calls transformers' own function, from the zero state."""

    def __init__(self, name: str, function: Any) -> None:
        self.name, self.function = name, function

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Any, options: str, padding: Tensor | None
    ) -> Tensor:
        """Return [batch, time, heads, d_v]."""
        if padding is not None:
            raise CaptureError(f"{self.name} takes no padding")
        settings = json.loads(options)
        if self.name == "selective_scan_fn":
            c, b, x, dt = (t.squeeze(1).transpose(1, 2) for t in (q, k, v, gates[0]))
            scanned: Tensor = self.function(x, dt, gates[1][0, 0, 0], b, c)
            return scanned.transpose(1, 2).unsqueeze(2)
        q, k, v, *gates = (t.transpose(1, 2) for t in (q, k, v, *gates))
        if self.name == "mamba_chunk_scan_combined":
            decay, dt = gates
            # the step sizes are within their limits
            unlimited = (-math.inf, math.inf)
            out: Tensor = self.function(v, dt, decay[0, 0], k, q, dt_limit=unlimited, **settings)
            return out
        result: tuple[Tensor, Any] = self.function(q, k, v, *gates, **settings)
        return result[0]

    def flops(self, options: str, heads: int, kv_heads: int, d_k: int, d_v: int) -> int:
        return 7 * heads * d_k * d_v

    def state_bytes(self, options: str, kv_heads: int, d_k: int, d_v: int) -> int:
        return 4 * kv_heads * d_k * d_v
