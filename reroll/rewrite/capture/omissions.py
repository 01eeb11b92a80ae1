"""Remarks on what a capture leaves out: inputs of other modalities, and unread weights."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

# names of arguments for pictures, videos and sound in all of transformers
_PERCEPTS = re.compile(
    r"pixel|image|video|audio|vision|input_features|input_values|patches|protein"
)


def omissions(model: Any, inputs: Collection[str], weights: Collection[str]) -> tuple[str, ...]:
    """Remark on what a capture with these inputs and these weights leaves out.

    `weights` holds all names of the weights that the graph reads.
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
    """Yield the arguments of a model's forward for pictures, videos or sound.

    Also yield `token_type_ids` where they separate these from text. They are yielded too where
    there is no table of types, because they are then looked up in the table of tokens.
    """
    arguments = inspect.signature(model.forward).parameters
    names = [n for n, a in arguments.items() if _PERCEPTS.search(n) and "Tensor" in str(a)]
    yield from names
    if names or not getattr(getattr(model, "config", None), "type_vocab_size", None):
        yield from (name for name in arguments if name == "token_type_ids")


def _unread(module: nn.Module, path: str, read: set[str]) -> Iterator[tuple[str, int]]:
    """Yield the largest parts of a module that are not read, with their numbers of parameters."""
    parameters = {
        _join(path, name): p for name, p in module.named_parameters(remove_duplicate=False)
    }
    if not parameters or parameters.keys() <= read:
        return
    if path and not parameters.keys() & read:
        yield path, sum({id(p): p.numel() for p in parameters.values()}.values())
        return
    for name, parameter in module.named_parameters(recurse=False):
        if _join(path, name) not in read:
            yield _join(path, name), parameter.numel()
    for name, child in module.named_children():
        yield from _unread(child, _join(path, name), read)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
