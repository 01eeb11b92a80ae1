"""Replace attention, masks and caches of a transformers model by single ops during a capture.

transformers looks attention and mask functions up by name, and the caller provides the cache
object. Inside `tracing`, a model finds reroll's functions and cache. Every attention becomes one
`reroll::attention` node, every mask one `reroll::mask` node, and every use of a cache one
`reroll::cache` node. What these ops cannot express raises an error that names it.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from reroll.errors import CaptureError
from reroll.rewrite.capture.entries import WEIGHTS_OF
from reroll.rewrite.capture.keywords import refuse_unmodelled
from reroll.rewrite.capture.masks import MaskKind, describe_mask
from reroll.rewrite.capture.recurrent import (
    KeptState,
    of_new_tokens,
    recurrences,
    with_last_inputs,
)

IMPLEMENTATION = "reroll"


class Halted(BaseException):
    """Exception that ends a trace in the middle of a model's forward, with the tensors there.

    It is no `Exception`, so that no model catches it.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.tensors = tensors


@dataclass
class Halt:
    """End of a trace: the number (from 1) of an attention or of a cache update."""

    at: int
    passed: int = 0

    def pass_by(self, **tensors: Tensor | None) -> None:
        """Count one attention or update; at the last one, raise Halted with its tensors."""
        self.passed += 1
        if self.passed == self.at:
            raise Halted({name: t for name, t in tensors.items() if t is not None})


def mask_interface(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    traced: Traced | None = None,
    **_: Any,
) -> Tensor:
    """Compute a mask by one `reroll::mask` node; transformers calls this function.

    Raises CaptureError for a mask that the op does not model.
    """
    mask_type = describe_mask(mask_function) if mask_function is not None else MaskKind(causal=True)
    if traced is not None:
        traced.spans.add(mask_type.window or mask_type.chunk)
    if isinstance(kv_offset, int) and kv_offset != 0:
        raise CaptureError(f"the keys of a mask start at {kv_offset}, not at 0")
    return torch.ops.reroll.mask(  # type: ignore[no-any-return]
        attention_mask, batch_size, q_length, kv_length, q_offset,
        mask_type.causal, mask_type.window, mask_type.chunk, mask_type.blocks, dtype,
    )  # fmt: skip


def attention_interface(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    halt: Halt | None = None,
    **keywords: Any,
) -> tuple[Tensor, Tensor]:
    """Compute attention by one `reroll::attention` node; transformers calls this function.

    `query` is [batch, heads, time, head_dim]; `key` and `value` have the key/value heads. The
    second result stands for the weights. Raises CaptureError for a keyword that the op does not
    model, and Halted at the attention that `halt` counts to.
    """
    refuse_unmodelled("attention", "reroll::attention", keywords, type(module).__name__)
    if attention_mask is not None and position_bias is not None:
        attention_mask = position_bias + attention_mask
    elif position_bias is not None:
        attention_mask = position_bias
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        low = torch.finfo(query.dtype).min
        attention_mask = torch.where(attention_mask, 0.0, low).to(query.dtype)
    if halt is not None:
        halt.pass_by(q=query, k=key, bias=attention_mask)
    out = torch.ops.reroll.attention(
        query,
        key,
        value,
        float(query.shape[-1] ** -0.5 if scaling is None else scaling),
        softcap=softcap,
        sinks=s_aux,
        bias=attention_mask,
    )
    return out, WEIGHTS_OF(out, query, key)


def custom_layers(config: Any) -> list[Any]:
    """Return the cache layers that transformers makes from a configuration; empty if it fails."""
    from transformers import DynamicCache

    try:
        return list(DynamicCache(config=config).layers)
    # a configuration class in a model's own code may raise any exception
    except Exception:
        return []


def make_cache(
    past: int,
    total: int,
    layers: int,
    cross: bool,
    custom: Sequence[Any] = (),
    halt: Halt | None = None,
) -> Any:
    """Create a cache for tracing with `past` tokens before the forward and `total` after it.

    With `cross`, it is for an encoder-decoder model, whose cross attention keeps no state. `custom`
    are the cache layers that the model would have. What they keep besides keys and values becomes
    another `reroll::cache` if it grows with the tokens, and raises CaptureError if not. `halt` ends
    the trace at an update.
    """
    from transformers.cache_utils import (
        Cache,
        CacheLayerMixin,
        EncoderDecoderCache,
        LinearAttentionCacheLayerMixin,
    )

    class TracedLayer(CacheLayerMixin):
        is_sliding = False

        def __init__(self, custom: Any = None) -> None:
            super().__init__()
            self._own = custom

        def lazy_initialization(self, *_: Any) -> None:
            self.is_initialized = True

        def update(self, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            if halt is not None:
                halt.pass_by(k=k, v=v)
            return torch.ops.reroll.cache(k, v, total)  # type: ignore[no-any-return]

        def __getattr__(self, name: str) -> Any:
            method = getattr(type(self.__dict__.get("_own")), name, None)
            if name.startswith("_") or not callable(method):
                raise AttributeError(f"a cache layer of the capture has no {name}")
            return partial(self._append, name)

        def _append(self, name: str, *states: Any, **options: Any) -> Tensor:
            """Append a tensor as keys without values, for a method of the model's own layer."""
            if len(states) != 1 or options or not _appends(self._own, name, states[0]):
                raise _not_captured(self._own, name)
            # [batch, time, head_dim] or [batch, heads, time, head_dim]
            keys = states[0] if states[0].dim() == 4 else states[0].unsqueeze(1)
            keys, _ = self.update(keys, keys[..., :0])
            return keys if states[0].dim() == 4 else keys.squeeze(1)

        def __setattr__(self, name: str, value: Any) -> None:
            if isinstance(value, Tensor | torch.SymInt):
                raise _not_captured(self._own, name)
            super().__setattr__(name, value)

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return total, 0

        def get_seq_length(self) -> int:
            return past

        def get_max_length(self) -> int:
            return -1

    class TracedRecurrence(TracedLayer, LinearAttentionCacheLayerMixin):
        """Keeps what a short convolution reads; a recurrence's op keeps its own state."""

        def __init__(self, custom: Any) -> None:
            TracedLayer.__init__(self, custom)
            self.has_previous_state = dict.fromkeys(range(custom.number_of_states), False)
            self.record_past = False

        def update_conv_state(
            self, x: Tensor, *_: Any, conv_kernel_size: int | None = None, **__: Any
        ) -> Tensor:
            if conv_kernel_size is None:
                raise CaptureError(
                    "its convolution keeps its inputs by code of the model's own, which is not "
                    "captured"
                )
            return with_last_inputs(x, conv_kernel_size)

        def update_recurrent_state(self, state: Tensor, *_: Any, **__: Any) -> Tensor:
            if not isinstance(state, KeptState):
                raise CaptureError(
                    "its recurrence is computed by code of the model's own, which is not captured"
                )
            return state

    def layer(custom: Any) -> TracedLayer:
        recurrent = isinstance(custom, LinearAttentionCacheLayerMixin)
        return (TracedRecurrence if recurrent else TracedLayer)(custom)

    class CrossLayer(TracedLayer):
        def update(self, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            return k, v

        def get_seq_length(self) -> int:
            return 0

    traced = Cache(layers=[layer(o) for o, _ in zip_longest(custom, range(layers))])
    if not cross:
        return traced
    return EncoderDecoderCache(traced, Cache(layers=[CrossLayer() for _ in range(layers)]))


def _appends(layer: Any, name: str, new: Tensor) -> bool:
    """Whether a method of a cache layer returns the concatenation of all its inputs over time.

    It is tested on an empty layer with two pieces; time is the dimension before the last.
    """
    if not isinstance(new, Tensor) or new.dim() not in (3, 4):
        return False
    with _disable_current_modes():
        pieces = [torch.full([2] * (new.dim() - 2) + [t, 2], float(t)) for t in (3, 1)]
        tried = copy.deepcopy(layer)
        try:
            results = [getattr(tried, name)(piece) for piece in pieces]
        # a method may raise any exception for an unexpected tensor
        except Exception:
            return False
        wanted = [pieces[0], torch.cat(pieces, dim=-2)]
        pairs = zip(results, wanted, strict=True)
        return all(isinstance(r, Tensor) and torch.equal(r, w) for r, w in pairs)


def _not_captured(layer: Any, name: str) -> CaptureError:
    return CaptureError(
        f"its cache keeps more than keys and values ({name}), which is not captured",
        where=None if layer is None else type(layer).__name__,
    )


@dataclass
class Traced:
    """Facts about a model observed during its trace.

    `packs`: the model passes positions to its masks, so that transformers separates packed
    documents. `spans`: the windows and chunks of its masks, None for masks with neither. `wishes`:
    the entries that it was asked for, such as `output_hidden_states`.
    """

    packs: bool = False
    spans: set[int | None] = field(default_factory=set)
    wishes: tuple[str, ...] = ()


@contextmanager
def tracing(model: nn.Module, implementation: str, halt: Halt | None = None) -> Iterator[Traced]:
    """Let `model` find reroll's functions; restore it and transformers afterwards.

    `implementation` is the name under which the model looks attention up. It is "reroll", or
    "eager" for a model that has its own attention and takes only the mask from transformers. `halt`
    ends the trace at an attention.
    """
    from transformers import masking_utils
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    modules = list(model.modules())
    training = [module.training for module in modules]
    configs = _configs(modules)
    chosen = [getattr(config, "_attn_implementation_internal", None) for config in configs]
    tables: list[dict[str, Any]] = [
        AttentionInterface._global_mapping,
        AttentionMaskInterface._global_mapping,
    ]
    saved = [dict(table) for table in tables]
    traced, prepare = Traced(), masking_utils._preprocess_mask_arguments

    def prepared(*args: Any, **kwargs: Any) -> Any:
        arguments = signature(prepare).bind(*args, **kwargs).arguments
        traced.packs |= arguments.get("position_ids") is not None
        return prepare(*args, **kwargs)

    pad = masking_utils.maybe_pad_block_sequence_ids
    local = masking_utils.create_recurrent_attention_mask
    try:
        _rebind("create_recurrent_attention_mask", local, _local_mask)
        _rebind("_preprocess_mask_arguments", prepare, prepared)
        _rebind("maybe_pad_block_sequence_ids", pad, _pad_blocks)
        if implementation == IMPLEMENTATION:
            tables[0][IMPLEMENTATION] = partial(attention_interface, halt=halt)
        tables[1][implementation] = partial(mask_interface, traced=traced)
        for config in configs:
            config._attn_implementation_internal = implementation
        model.eval()
        with recurrences(model):
            yield traced
    finally:
        _rebind("_preprocess_mask_arguments", prepared, prepare)
        _rebind("maybe_pad_block_sequence_ids", _pad_blocks, pad)
        _rebind("create_recurrent_attention_mask", _local_mask, local)
        for table, before in zip(tables, saved, strict=True):
            table.clear()
            table.update(before)
        for config, was in zip(configs, chosen, strict=True):
            config._attn_implementation_internal = was
        for module, trained in zip(modules, training, strict=True):
            module.training = trained


def _local_mask(
    config: Any, inputs_embeds: Tensor, attention_mask: Tensor | None, *_: Any, **__: Any
) -> Tensor | None:
    """Return the padding mask [batch, time] of the new tokens, for a recurrence or convolution."""
    if attention_mask is None or attention_mask.ndim != 2:
        return None
    return of_new_tokens(attention_mask, inputs_embeds.shape[1])


def _pad_blocks(
    block_sequence_ids: Tensor, attention_mask: Tensor | None, kv_length: int, kv_offset: int
) -> Tensor:
    """Pad block numbers to [batch, kv_length] with -1.

    The function of transformers tests whether there is anything to pad, which would specialise the
    graph to the example.
    """
    del attention_mask
    length = block_sequence_ids.shape[1]
    index = torch.arange(kv_length + kv_offset, device=block_sequence_ids.device)
    # with a concatenation, empty padding would be a special case for the exporter
    known = block_sequence_ids[:, index.clamp(max=length - 1)]
    return torch.where(index < length, known, -1)


def _rebind(name: str, function: Any, other: Any) -> None:
    """Rebind a name to `other` in all modules of transformers where it is bound to `function`.

    Models import mask functions by name, some of them during the trace.
    """
    for module in list(sys.modules.values()):
        ours = getattr(module, "__name__", "").startswith("transformers.")
        if ours and vars(module).get(name) is function:
            setattr(module, name, other)


def _configs(modules: list[nn.Module]) -> list[Any]:
    """Collect all configuration objects of the model's modules, nested ones included."""
    configs: dict[int, Any] = {}
    queue: list[Any] = [module.config for module in modules if hasattr(module, "config")]
    while queue:
        config = queue.pop()
        if id(config) in configs or not hasattr(config, "_attn_implementation_internal"):
            continue
        configs[id(config)] = config
        queue += [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    return list(configs.values())
