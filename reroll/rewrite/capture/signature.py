"""Inputs that a model is captured with: names, dynamic dimensions, and example tensors.

They follow from the names of the forward function's arguments and from the sizes in the
configuration. All transformers models of a modality use the same names.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from reroll.errors import CaptureError

log = logging.getLogger(__name__)

# example sizes: all different and none of them 1, so that export keeps the dimensions apart
_SIZES = {"b": 3, "s": 5, "t": 12, "e": 7, "l": 160}


@dataclass(frozen=True)
class Example:
    """Example input for a capture: a tensor, names of its dynamic dimensions, and its role."""

    name: str
    tensor: Tensor
    dims: tuple[str | int, ...]
    role: str = "data"


def has_state(model: Any) -> bool:
    """Whether the model's forward takes a cache and generates with it."""
    return cache_argument(model) is not None and (
        bool(getattr(model.config, "is_encoder_decoder", False)) or can_generate(model)
    )


def cache_argument(model: Any) -> str | None:
    """Return the name of the cache in the model's forward; None if it takes none.

    Models without attention, such as Mamba, have another name for it.
    """
    names = _arguments(model)
    return next((name for name in ("past_key_values", "cache_params") if name in names), None)


def can_generate(model: Any) -> bool:
    """Whether a model predicts tokens: it reports so, or it has a head over its vocabulary."""
    if hasattr(model, "can_generate") and model.can_generate():
        return True
    return getattr(model, "get_output_embeddings", lambda: None)() is not None


def wraps_labels(model: Any) -> bool:
    """Whether a decoder given labels alone takes the last as its first token, as mBART does."""
    prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if prepare is None:
        return False
    pad = getattr(model.config, "pad_token_id", None) or 0
    # a fixed start token equals the last label of at most one of the two
    several = [torch.arange(pad + start, pad + start + 3)[None] for start in (1, 4)]
    try:
        return all(torch.equal(prepare(labels), labels.roll(1, dims=1)) for labels in several)
    # the model's own method may need attributes that the configuration lacks
    except Exception as error:
        log.info("how %s moves its labels is not known: %s", type(model).__name__, error)
        return False


def scales_embeddings(model: Any) -> bool:
    """Whether the module that looks up a model's tokens does more, such as Gemma 3's, which scales.

    Others scale behind it, as Granite does, so that embeddings are given to them unscaled.
    """
    table = getattr(model, "get_input_embeddings", lambda: None)
    try:
        module = table()
    # transformers' own method raises for a model that has no tokens
    except NotImplementedError:
        return False
    return isinstance(module, nn.Embedding) and type(module).forward is not nn.Embedding.forward


def adds_tokens(model: Any) -> bool:
    """Whether a decoder appends tokens of its own in generation, as XLM does its mask token."""
    prepare = getattr(model, "prepare_inputs_for_generation", None)
    if prepare is None or not is_decoder(model):
        return False
    tokens = torch.ones(1, 2, dtype=torch.long)
    try:
        prepared = prepare(tokens, is_first_iteration=True, use_cache=False)
    # the model's own method may need more than tokens
    except Exception as error:
        log.info("what %s reads to generate is not known: %s", type(model).__name__, error)
        return False
    read = prepared.get("input_ids")
    return read is not None and not torch.equal(read, tokens)


def is_decoder(model: Any) -> bool:
    """Whether a model is a decoder: it takes tokens, generates, and has no encoder."""
    encoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return can_generate(model) and model.main_input_name == "input_ids" and not encoder


def default_examples(model: Any, stateful: bool) -> list[Example]:
    """Build example inputs for a transformers model, chosen by its main input's name.

    With `stateful` there is a past, so the padding mask is longer than the tokens. Raises
    CaptureError for an unknown modality.
    """
    main = model.main_input_name
    arguments = _arguments(model)
    if main not in arguments:
        main = next((name for name in arguments if name in _MAKERS), main)
    if main not in _MAKERS:
        raise CaptureError(
            f"do not know what the input {main!r} of {type(model).__name__} looks like",
            hint="pass example tensors: capture(model, inputs={...})",
        )
    config = model.config
    if not getattr(config, "is_encoder_decoder", False):
        return _MAKERS[main](config, main, arguments, "t" if stateful else "s", "s")
    examples = _MAKERS[main](config, main, arguments - {"position_ids"}, "e", "e")
    total = "t" if stateful else "s"
    examples.append(_tokens("decoder_input_ids", "s"))
    if "decoder_attention_mask" in arguments:
        examples.append(_ones("decoder_attention_mask", total))
    if "decoder_position_ids" in arguments:
        examples.append(_positions("decoder_position_ids", stateful))
    return examples


def frames_mask(model: Any, examples: list[Example]) -> Example | None:
    """Build an example of the padding mask of a spectrogram's frames.

    Return None if the model takes none, or is captured with it.
    """
    frames = next((e.tensor for e in examples if e.name == "input_features"), None)
    taken = "attention_mask" in _arguments(model)
    if frames is None or not taken or any(e.name == "attention_mask" for e in examples):
        return None
    ones = torch.ones(frames.shape[0], frames.shape[-1], dtype=torch.long)
    return Example("attention_mask", ones, ("b", frames.shape[-1]), "padding")


def picture_examples(model: Any) -> list[Example]:
    """Build examples of pictures for a model that also reads text: any number, and one.

    Raises CaptureError if it takes none.
    """
    if "pixel_values" not in _arguments(model):
        raise CaptureError("the model takes no pictures", where=type(model).__name__)
    (example,) = _image(model.config, "pixel_values", set())
    # the number of pictures is that in the text, and need not be one for each row
    some = replace(example, dims=("p", *example.dims[1:]), role="pictures")
    return [some, replace(some, tensor=some.tensor[:1], dims=(1, *some.dims[1:]))]


def examples_from(inputs: Mapping[str, Tensor]) -> list[Example]:
    """Wrap the caller's own example tensors, with a dynamic batch dimension."""
    return [
        Example(name, tensor, ("b", *tensor.shape[1:]) if tensor.dim() else ())
        for name, tensor in inputs.items()
    ]


def _arguments(model: Any) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


def _text(config: Any, main: str, arguments: set[str], total: str, tokens: str) -> list[Example]:
    examples = [_tokens(main, tokens)]
    if "attention_mask" in arguments:
        examples.append(_ones("attention_mask", total))
    if "position_ids" in arguments:
        examples.append(_positions("position_ids", total != tokens))
    # with a single token type, the ids are constant
    if "token_type_ids" in arguments and (getattr(config, "type_vocab_size", None) or 0) > 1:
        zeros = torch.zeros(_SIZES["b"], _SIZES[tokens], dtype=torch.long)
        examples.append(Example("token_type_ids", zeros, ("b", tokens), "zeros"))
    return examples


def _image(config: Any, main: str, arguments: set[str], *_: str) -> list[Example]:
    vision = getattr(config, "vision_config", config)
    size: Any = getattr(vision, "image_size", 224)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    shape = (int(getattr(vision, "num_channels", 3)), int(height), int(width))
    return [Example(main, torch.zeros(_SIZES["b"], *shape), ("b", *shape))]


def _spectrogram(config: Any, main: str, arguments: set[str], *_: str) -> list[Example]:
    frames = int(getattr(config, "max_source_positions", 1500)) * 2
    shape = (int(getattr(config, "num_mel_bins", 80)), frames)
    return [Example(main, torch.zeros(_SIZES["b"], *shape), ("b", *shape))]


def _waveform(config: Any, main: str, arguments: set[str], *_: str) -> list[Example]:
    return [Example(main, torch.zeros(_SIZES["b"], 16000), ("b", 16000))]


_MAKERS: dict[str, Callable[[Any, str, set[str], str, str], list[Example]]] = {
    "input_ids": _text,
    "pixel_values": _image,
    "input_features": _spectrogram,
    "input_values": _waveform,
}


def _tokens(name: str, length: str) -> Example:
    ids = torch.arange(2, 2 + _SIZES["b"] * _SIZES[length]).reshape(_SIZES["b"], -1)
    return Example(name, ids, ("b", length))


def _ones(name: str, length: str) -> Example:
    ones = torch.ones(_SIZES["b"], _SIZES[length], dtype=torch.long)
    return Example(name, ones, ("b", length), "padding")


def _positions(name: str, stateful: bool) -> Example:
    start = _SIZES["t"] - _SIZES["s"] if stateful else 0
    positions = torch.arange(start, start + _SIZES["s"]).expand(_SIZES["b"], -1).contiguous()
    return Example(name, positions, ("b", "s"), "positions")
