"""What of a model a capture leaves out: inputs of other modalities, and weights nothing reads."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

# how arguments that hold pictures, films and sound are named in all of transformers
_PERCEPTS = re.compile(
    r"pixel|image|video|audio|vision|input_features|input_values|patches|protein"
)


def omissions(model: Any, inputs: Collection[str], weights: Collection[str]) -> tuple[str, ...]:
    """Remarks on what is left out of a capture with these inputs, whose graph reads these weights.

    `weights` holds every name of a weight that is read, also where it has several.
    """
    remarks = []
    if left_out := [name for name in percepts(model) if name not in inputs]:
        captured = f"captured with {', '.join(inputs)} alone"
        remarks.append(f"{captured}: the inputs {', '.join(left_out)} are left out")
    if unread := dict(_unread(model, "", set(weights))):
        counts = [f"{path} ({count:,})" for path, count in unread.items()]
        remarks.append(f"parameters that are not read are left out: {', '.join(counts)}")
    return tuple(remarks)


def percepts(model: Any) -> Iterator[str]:
    """The arguments of a model's forward that hold pictures, films or sound, and token types that
    tell these from text, or that are looked up among the tokens (where no table of types is).
    """
    arguments = inspect.signature(model.forward).parameters
    found = [n for n, a in arguments.items() if _PERCEPTS.search(n) and "Tensor" in str(a)]
    yield from found
    if found or not getattr(getattr(model, "config", None), "type_vocab_size", None):
        yield from (name for name in arguments if name == "token_type_ids")


def _unread(module: nn.Module, path: str, read: set[str]) -> Iterator[tuple[str, int]]:
    """The largest parts of a module of which nothing is read, with their numbers of parameters."""
    own = {_join(path, name): p for name, p in module.named_parameters(remove_duplicate=False)}
    if not own or own.keys() <= read:
        return
    if path and not own.keys() & read:
        yield path, sum({id(p): p.numel() for p in own.values()}.values())
        return
    for name, parameter in module.named_parameters(recurse=False):
        if _join(path, name) not in read:
            yield _join(path, name), parameter.numel()
    for name, child in module.named_children():
        yield from _unread(child, _join(path, name), read)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
