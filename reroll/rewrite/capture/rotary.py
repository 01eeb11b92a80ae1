"""Compute rotary frequencies that depend on the length of a text from its positions.

transformers keeps frequencies in a buffer. For LongRoPE and dynamic NTK, the decorator
`dynamic_rope_update` rewrites that buffer before each forward of the embedding. It uses the largest
position of the call, so a result may depend on earlier calls. During a capture, rotary embeddings
compute the frequencies from the positions alone, like an original without earlier, longer texts.
This also holds in decoding: each call uses the frequencies of the current length, and cached keys
keep those of their own call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from reroll.rewrite.capture.tracing import make_cache


@contextmanager
def frequencies_by_position(model: nn.Module) -> Iterator[None]:
    """Let the rotary embeddings of `model` write no buffer; restore them afterwards."""
    saved = []
    for module in model.modules():
        forward = _undecorated(type(module).forward)
        # an instance whose forward has been replaced is left alone
        if forward is not None and "forward" not in vars(module):
            saved.append((module, dict(vars(module))))
            _add_long_frequencies(module)
            module.forward = partial(_forward, module, forward)
    try:
        yield
    finally:
        for module, before in saved:
            vars(module).clear()
            vars(module).update(before)


def rereading_length(model: Any) -> int | None:
    """Return the length at which a LongRoPE model's generation drops its cache, else None.

    Keys that were cached with the frequencies of short texts do not match those of long ones. Some
    models keep them, others recompute the whole text; `prepare_inputs_for_generation` tells which.
    """
    lengths = [
        _parameters(module, layer_type)["original_max_position_embeddings"]
        for module in model.modules()
        if _undecorated(type(module).forward) is not None
        for layer_type, rope_type in _rope_types(module).items()
        if rope_type == "longrope"
    ]
    if not lengths or not hasattr(model, "prepare_inputs_for_generation"):
        return None
    full = min(lengths)
    ids = torch.ones(1, full + 1, dtype=torch.long)
    prepared = model.prepare_inputs_for_generation(
        ids,
        past_key_values=make_cache(full, full + 1, layers=1, cross=False),
        attention_mask=ids,
        next_sequence_length=1,
    )
    return full + 1 if prepared.get("past_key_values") is None else None


def _undecorated(forward: Any) -> Callable[..., Any] | None:
    """Return the function that `dynamic_rope_update` wraps, below other decorators; else None."""
    from transformers.modeling_rope_utils import dynamic_rope_update

    wrapper = dynamic_rope_update(forward).__code__
    while (inner := getattr(forward, "__wrapped__", None)) is not None:
        if getattr(forward, "__code__", None) is wrapper:
            return inner  # type: ignore[no-any-return]
        forward = inner
    return None


def _rope_types(module: Any) -> dict[str | None, str]:
    """Return the rope type by layer type, with the key None where all layers share one."""
    kinds = module.rope_type
    return dict(kinds) if isinstance(kinds, dict) else {None: kinds}


def _parameters(module: Any, layer_type: str | None) -> Any:
    parameters = module.config.rope_parameters
    return parameters if layer_type is None else parameters[layer_type]


def _name(layer_type: str | None, rest: str) -> str:
    return rest if layer_type is None else f"{layer_type}_{rest}"


def _add_long_frequencies(module: Any) -> None:
    """Precompute LongRoPE's frequencies for long texts, which transformers computes on demand."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for layer_type, rope_type in _rope_types(module).items():
        if rope_type == "longrope":
            length = _parameters(module, layer_type)["original_max_position_embeddings"]
            options = {} if layer_type is None else {"layer_type": layer_type}
            long, _ = ROPE_INIT_FUNCTIONS[rope_type](
                module.config, "cpu", seq_len=length + 1, **options
            )
            vars(module)[_name(layer_type, "long_inv_freq")] = long


def _forward(
    module: Any,
    forward: Callable[..., Any],
    x: Tensor,
    position_ids: Tensor,
    layer_type: str | None = None,
) -> Any:
    """Compute the embedding of `position_ids` with frequencies that are no buffer in the call."""
    options = {} if layer_type is None else {"layer_type": layer_type}
    frequencies = _frequencies(module, position_ids, layer_type)
    if frequencies is None:
        return forward(module, x, position_ids, **options)
    # an attribute of the instance is found before its buffer of the same name
    name = _name(layer_type, "inv_freq")
    vars(module)[name] = frequencies
    try:
        return forward(module, x, position_ids, **options)
    finally:
        del vars(module)[name]


def _frequencies(module: Any, position_ids: Tensor, layer_type: str | None) -> Tensor | None:
    """Return the frequencies [head_dim / 2] for the largest position; None if they are constant.

    They are those of `dynamic_rope_update`, but independent of earlier calls.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope_type = _rope_types(module)[layer_type]
    if rope_type != "longrope" and "dynamic" not in rope_type:
        return None
    length = position_ids.max() + 1
    original: Tensor = getattr(module, _name(layer_type, "original_inv_freq"))
    if rope_type == "longrope":
        limit = _parameters(module, layer_type)["original_max_position_embeddings"]
        longer: Tensor = getattr(module, _name(layer_type, "long_inv_freq"))
    else:
        limit = module.original_max_seq_len
        options = {} if layer_type is None else {"layer_type": layer_type}
        longer, _ = ROPE_INIT_FUNCTIONS[rope_type](
            module.config, position_ids.device, seq_len=length, **options
        )
    return torch.where(length > limit, longer, original)
