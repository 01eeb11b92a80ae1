"""Captures of models that are alike: made once in a run of tests, and read again by all others.

For tests of what is done with a capture; those of capturing go without (see `captured_once`).
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch

from reroll.rewrite.capture.export import _Captured as Captured
from reroll.rewrite.capture.models import describe
from reroll.rewrite.checkpoint import ChainSource, MemorySource
from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.records import Origin
from reroll.rewrite.ir.text.parser import parse
from reroll.rewrite.ir.text.printer import to_text
from tests import captured

# the captures of this process, by their keys
known: dict[str, dict[str, Any]] = {}


def remembering(capture: Callable[..., Captured]) -> Callable[..., Captured]:
    """`reroll.rewrite.capture.export._captured`, which captures a model once in a run.

    Models are alike if all are equal that a capture reads of them: class, configuration, names,
    shapes and ties of parameters, dtype, buffers, names of the checkpoint's tensors, settings.
    """

    def remembered(model, inputs, pictures, source=None, origin=None, halves=False):
        if inputs is not None or not hasattr(model, "config"):
            return capture(model, inputs, pictures, source, origin, halves=halves)
        given = describe(model) if origin is None else origin
        key = _key(model, pictures, source, given, halves)
        kept = _kept(key)
        if kept is None:
            found = capture(model, inputs, pictures, source, origin, halves=halves)
            kept = _entry(model, found, source, given)
            _keep(key, kept)
        return _captured_of(model, kept, source, given)

    return remembered


def _key(model: Any, pictures: bool, source: Any, given: Origin, halves: bool) -> str:
    first: dict[int, str] = {}
    parameters = [
        (name, p.shape, p.dtype, first.setdefault(id(p), name))
        for name, p in model.named_parameters(remove_duplicate=False)
    ]
    digest = hashlib.sha256()
    for name, buffer in model.named_buffers(remove_duplicate=False):
        digest.update(f"{name} {buffer.dtype} {buffer.shape} {buffer.device.type}".encode())
        if buffer.device.type != "meta":
            data = buffer.detach().cpu().contiguous().view(-1).view(torch.uint8)
            digest.update(data.numpy().tobytes())
    names = None if source is None else sorted(source.names())
    config = {name: value for name, value in given.config.items() if name != "_name_or_path"}
    origin = replace(given, model="", revision=None, config=config, files={})
    settings = (type(model), model.config, model.dtype, model.training, pictures, halves)
    digest.update(str((parameters, names, origin, settings)).encode())
    return digest.hexdigest()


def _entry(model: Any, found: Captured, source: Any, given: Origin) -> dict[str, Any]:
    """What is kept of a capture: its texts, its constants, and what it adds to the origin."""
    elsewhere = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    elsewhere |= set() if source is None else set(source.names())
    program, added = found.program, {}
    for field in fields(Origin):
        value = getattr(program.origin, field.name)
        if value != getattr(given, field.name):
            added[field.name] = value
    return {
        "texts": [None if p is None else to_text(p) for p in (program, found.in_half)],
        "constants": {
            n: program.source.load(n) for n in program.source.names() if n not in elsewhere
        },
        "origin": added,
        "halves": found.halves,
    }


def _captured_of(model: Any, kept: dict[str, Any], source: Any, given: Origin) -> Captured:
    """A capture that is kept, of this model: with its weights, its name and its files."""
    tensors = dict(kept["constants"])
    if source is None:
        parameters = model.named_parameters(remove_duplicate=False)
        tensors |= {name: parameter.detach() for name, parameter in parameters}
    sources = [MemorySource(tensors)] + ([] if source is None else [source])
    programs: list[Program | None] = []
    for text in kept["texts"]:
        if text is not None:
            program = parse(text, ChainSource(sources))
            text = replace(program, origin=replace(given, **kept["origin"]))
        programs.append(text)
    program, in_half = programs
    assert program is not None
    return Captured(program, in_half, kept["halves"])


def _kept(key: str) -> dict[str, Any] | None:
    if key not in known and captured.shared is not None:
        file = captured.shared / f"{key}.pickle"
        if file.exists():
            known[key] = pickle.loads(file.read_bytes())
    return known.get(key)


def _keep(key: str, kept: dict[str, Any]) -> None:
    known[key] = kept
    if captured.shared is not None:
        captured.appear(pickle.dumps(kept), captured.shared / f"{key}.pickle")
