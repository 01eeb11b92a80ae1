"""Write the weight file as it is planned: weights are computed and written one at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reroll.errors import ExportError
from reroll.export.onnx.graph import array_of
from reroll.export.onnx.plan.record import Plan, stored_name
from reroll.export.onnx.plan.weights import FILE, Form, Region
from reroll.rewrite.ir.weights.evaluation import Output, evaluate_outputs


def write_weights(
    plan: Plan, directory: Path, progress: Callable[[int, int], None] | None = None
) -> None:
    """Compute every planned weight, and write the file.

    Raises ExportError if the file cannot be written.
    """
    total, done = sum(r.bytes for each in plan.plans for r in each.regions), 0
    try:
        with (directory / FILE).open("wb") as file:
            file.truncate(plan.size)
            for each in plan.plans:
                for region, entry, tensor in _computed(each):
                    file.seek(region.offset + entry * region.form.bytes)
                    file.write(_bytes(region.form, tensor))
                    done += region.form.bytes
                    if progress is not None:
                        progress(done, total)
    except OSError as error:
        raise ExportError(f"cannot be written: {error.strerror}", where=FILE) from error


def _computed(plan: Plan) -> Iterator[tuple[Region, int, Tensor]]:
    """Compute the weights of a plan's regions: a region, the number of an entry, the entry."""
    forms: dict[str, list[Region]] = {}
    for region in plan.regions:
        forms.setdefault(region.weight, []).append(region)
    outputs = [
        Output(name, entry, expr)
        for name in forms
        for entry, expr in enumerate(plan.program.weights[name].entries)
    ]
    for name, entry, tensor in evaluate_outputs(outputs, plan.program.source):
        for region in forms[name]:
            yield region, entry, tensor


def digests(plan: Plan, directory: Path) -> dict[str, str]:
    """Return the SHA-256 of every weight's bytes in the written file, by name."""
    found = {}
    with (directory / FILE).open("rb") as file:
        for each in plan.plans:
            for region in each.regions:
                file.seek(region.offset)
                digest, left = hashlib.sha256(), region.bytes
                while left:
                    piece = file.read(min(left, 2**24))
                    digest.update(piece)
                    left -= len(piece)
                found[stored_name(plan, each, region)] = digest.hexdigest()
    return found


def _bytes(form: Form, tensor: Tensor) -> Any:
    with torch.no_grad():
        made = form.make(tensor)
    assert tuple(made.shape) == form.shape, (form.name, tuple(made.shape), form.shape)
    assert made.dtype == form.dtype
    return array_of(made).reshape(-1).view("uint8").data
