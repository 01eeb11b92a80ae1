"""Running a Program in a wider dtype than it was captured in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from reroll.errors import UsageError
from reroll.rewrite.program import Program, TensorType
from reroll.rewrite.weights import Weight, WeightTable, cast

_HALF = (torch.bfloat16, torch.float16)


def retype(program: Program, dtype: torch.dtype | str | None) -> Program:
    """The Program in another dtype: the same one, or fp32 for one in half precision.

    Widening is exact for the weights. Anything else would change what the graph computes, since a
    Program holds casts that were captured for its own dtype; UsageError.
    """
    if isinstance(dtype, str):
        dtype = program.dtype if dtype == "auto" else getattr(torch, dtype, dtype)
    if dtype is None or dtype == program.dtype:
        return program
    if program.dtype not in _HALF or dtype != torch.float32:
        name = str(dtype).removeprefix("torch.")
        raise UsageError(
            f"a program in {str(program.dtype).removeprefix('torch.')} does not run in {name}",
            hint=f"capture the original model in it: capture(model, dtype={name!r})",
        )
    narrow, program = program.dtype, program.edit()

    def wide(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(wide(v) for v in value)
        return dtype if value == narrow and isinstance(value, torch.dtype) else value

    for _, graph in program.graphs():
        for node in graph.nodes:
            _widen(node, narrow, wide)
    inputs = tuple(
        replace(i, type=TensorType(wide(i.type.dtype), i.type.shape)) for i in program.inputs
    )
    table = {
        name: Weight(
            tuple(cast(e, dtype) if e.meta.dtype == narrow else e for e in weight.entries),
            weight.index,
            weight.trainable,
        )
        for name, weight in program.weights.items()
    }
    return replace(program, weights=WeightTable(table), inputs=inputs, dtype=dtype)


def _widen(node: fx.Node, narrow: torch.dtype, wide: Any) -> None:
    node.args = tuple(wide(a) for a in node.args)
    node.kwargs = {k: wide(v) for k, v in node.kwargs.items()}
    kind = node.meta.get("type")
    if isinstance(kind, TensorType) and kind.dtype == narrow:
        node.meta["type"] = TensorType(torch.float32, kind.shape)
