"""Rotary frequencies that depend on the length of a text, as a function of its positions.

transformers keeps frequencies in a buffer. For LongRoPE and dynamic NTK, the decorator
`dynamic_rope_update` writes that buffer anew before each forward of the embedding, by the largest
position of the call, so a result may depend on the calls before it. While a model is being
captured, its rotary embeddings compute the frequencies from the positions alone, as an original
does that has seen no longer text before. This holds for whole texts and for tokens that are
decoded one by one: each call takes the frequencies of the length reached, and keys that are
cached already keep those of their own call.
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
    """Let the rotary embeddings of `model` write no buffer; leave them as they were afterwards."""
    saved = []
    for module in model.modules():
        forward = _undecorated(type(module).forward)
        # an instance whose forward somebody has replaced is left to them
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
    """The length at which a model's generation drops its cache; None if no LongRoPE makes it so.

    Keys that were cached with the frequencies of short texts do not fit those of long ones. Some
    models go on all the same, others read the text anew: their generation is asked.
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
    """The function that `dynamic_rope_update` has wrapped, below other decorators."""
    from transformers.modeling_rope_utils import dynamic_rope_update

    wrapper = dynamic_rope_update(forward).__code__
    while (inner := getattr(forward, "__wrapped__", None)) is not None:
        if getattr(forward, "__code__", None) is wrapper:
            return inner  # type: ignore[no-any-return]
        forward = inner
    return None


def _rope_types(module: Any) -> dict[str | None, str]:
    """The kind of frequencies by the type of layer; under None where all layers share them."""
    kinds = module.rope_type
    return dict(kinds) if isinstance(kinds, dict) else {None: kinds}


def _parameters(module: Any, layer_type: str | None) -> Any:
    parameters = module.config.rope_parameters
    return parameters if layer_type is None else parameters[layer_type]


def _name(layer_type: str | None, rest: str) -> str:
    return rest if layer_type is None else f"{layer_type}_{rest}"


def _add_long_frequencies(module: Any) -> None:
    """Compute the frequencies beyond the original length, where transformers does so when asked."""
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
    """The embedding of `position_ids`, with frequencies that are no buffer during the call."""
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
    """The frequencies [head_dim / 2] for texts up to the largest position; None if it is no matter.

    As `dynamic_rope_update`, without its memory of earlier calls.
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
