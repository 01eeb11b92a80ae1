"""Prompts for exported graphs: in pieces, and by ONNX's reference evaluator."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.ops import op_loop
from torch import Tensor

from reroll.export.onnx.emit.check import prompts
from reroll.export.onnx.emit.session import Session
from reroll.rewrite.analysis import tolerances
from reroll.rewrite.ir.program import Program


def inputs(ids: Tensor, seen: Tensor, start: int = 0, end: int | None = None) -> dict[str, Tensor]:
    """The inputs of a causal graph for the tokens from `start` to `end` of a padded batch."""
    positions = (seen.cumsum(-1) - 1).clamp(min=0)
    return {
        "input_ids": ids[:, start:end],
        "attention_mask": seen[:, :end],
        "position_ids": positions[:, start:end],
    }


def check_pieces(program: Program, path: Path, sizes: list[int], rows: int = 3) -> None:
    """That a prompt in pieces of these sizes has the logits that it has at once."""
    ids, seen = prompts(program, rows, sum(sizes))
    session = Session(path)
    results = []
    for pieces in ([sum(sizes)], sizes):
        session.reset(len(ids))
        ends = np.cumsum(pieces).tolist()
        logits = [
            session.run(inputs(ids, seen, end - size, end))["logits"]
            for size, end in zip(pieces, ends, strict=True)
        ]
        results.append(torch.cat(logits, 1)[seen.bool()])
    assert tolerances.relative_rms(*results) < 1e-5


def check_reference(program: Program, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That the reference evaluator of onnx computes the logits of the module."""
    # it joins what a Loop scans, where the specification stacks it
    monkeypatch.setattr(op_loop.np, "vstack", np.stack)
    evaluator = ReferenceEvaluator(str(path))
    ids, seen = prompts(program, rows=2, length=6)
    given = {name: value.numpy() for name, value in inputs(ids, seen).items()}
    sizes = {"batch_size": 2, "past_sequence_length": 0}
    for item in onnx.load(path, load_external_data=False).graph.input:
        if item.name.startswith("past_key_values"):
            dims = item.type.tensor_type.shape.dim
            shape = [sizes[d.dim_param] if d.dim_param else d.dim_value for d in dims]
            given[item.name] = np.zeros(shape, np.float32)
    actual = torch.from_numpy(np.array(evaluator.run(["logits"], given)[0]))
    with torch.no_grad():
        expected = program.to_module()(**inputs(ids, seen)).logits
    shown = seen.bool()
    assert tolerances.relative_rms(actual[shown], expected[shown]) < 1e-5
