"""Files of states: what a model has read, to go on from in another process.

A file has the tokens, and the tensors of each cache layer. It belongs to one Program with one set
of weights, and says so. A state of constant size makes a file of constant size.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache

from reroll.errors import CheckpointError, UsageError
from reroll.rewrite.ir.text.compare import fingerprint
from reroll.runtime.state.caches import layers_of
from reroll.runtime.state.states import state_attributes
from reroll.writing import Paths, new_file

_FORMAT = "reroll state 1"
# of each parameter, so many values are in the fingerprint of the weights
_SAMPLES = 64


def save_state(
    path: str | Path,
    model: Any,
    tokens: Tensor,
    cache: DynamicCache,
    *,
    overwrite: bool = False,
    sources: Paths = (),
) -> None:
    """Write what a lowered model has read.

    `tokens` [1, time] are all tokens, of which `cache` has read the first: all, or all but the
    last. The file appears whole, or not at all. Raises UsageError for another cache, and where
    `reroll.writing` does.
    """
    length = int(cache.get_seq_length())
    if tokens.shape[0] != 1 or not 0 <= tokens.shape[1] - length <= 1:
        raise UsageError(
            f"the cache holds {length} tokens, and there are {tuple(tokens.shape)}",
            where="save_state",
            hint="give one row: all tokens that the cache has read, and at most one more",
        )
    tensors: dict[str, Tensor] = {"tokens": tokens}
    if any(layer.is_compileable for layer in cache.layers):
        raise UsageError("only the state of a DynamicCache is saved", where="save_state")
    layers = [
        {name: _packed(value, f"{number}.{name}", tensors) for name, value in each.items()}
        for number, each in enumerate(map(state_attributes, cache.layers))
    ]
    about = {
        "format": _FORMAT,
        "program": fingerprint(model.program),
        "weights": weights_fingerprint(model),
        "tokens": _digest(tokens),
        "length": length,
        "dtype": str(model.dtype),
        "layers": layers,
    }
    # a copy, since a layer may hold views
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with new_file(path, overwrite=overwrite, sources=sources) as temporary:
        save_file(tensors, temporary, {"reroll": json.dumps(about)})


def load_state(path: str | Path, model: Any) -> tuple[Tensor, DynamicCache]:
    """Read a file that `save_state` wrote: the tokens [1, time], and the cache.

    Raises CheckpointError for a file that is damaged or none of a state, and UsageError for one of
    another Program, other weights or another dtype.
    """
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("reroll", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"no state can be read: {error}", where=str(path)) from error
    if about.get("format") != _FORMAT:
        raise CheckpointError(
            "this is not a file of a state", where=str(path), hint="save one by --save-state"
        )
    if _digest(tensors["tokens"]) != about["tokens"]:
        raise CheckpointError("the tokens are not those that were saved", where=str(path))
    present = {
        "program": fingerprint(model.program),
        "weights": weights_fingerprint(model),
        "dtype": str(model.dtype),
    }
    for name, value in present.items():
        if about[name] != value:
            raise UsageError(
                f"the state is of another {name}",
                where=str(path),
                hint="open the model that has saved it, in its dtype; or read the prompt again",
            )
    cache = DynamicCache(config=model.config)
    layers = layers_of(cache, model._assembly.layers) or []
    for layer, packed in zip(layers, about["layers"], strict=True):
        layer.dtype, layer.device = model.dtype, model.device
        for name, data in packed.items():
            setattr(layer, name, _unpacked(data, tensors, model.device))
    return tensors["tokens"].to(model.device), cache


def weights_fingerprint(model: Any) -> str:
    """Return a digest of the names, shapes and some values of a model's parameters."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        some = flat[:: max(1, flat.numel() // _SAMPLES)].float().cpu().numpy()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(some.tobytes())
    return digest.hexdigest()


def _digest(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.to(torch.int64).cpu().contiguous().numpy().tobytes()).hexdigest()


def _packed(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Return a value as JSON data, with its tensors in `tensors` under their paths."""
    if isinstance(value, Tensor):
        tensors[path] = value
        return {"tensor": path}
    if isinstance(value, list):
        return {"list": [_packed(v, f"{path}.{i}", tensors) for i, v in enumerate(value)]}
    if isinstance(value, dict):
        return {"dict": [[k, _packed(v, f"{path}.{k}", tensors)] for k, v in value.items()]}
    return {"value": value}


def _unpacked(data: Any, tensors: dict[str, Tensor], device: torch.device) -> Any:
    if "tensor" in data:
        return tensors[data["tensor"]].to(device)
    if "list" in data:
        return [_unpacked(v, tensors, device) for v in data["list"]]
    if "dict" in data:
        return {k: _unpacked(v, tensors, device) for k, v in data["dict"]}
    return data["value"]
