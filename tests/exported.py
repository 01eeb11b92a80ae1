"""Programs of small modules, for tests of what is done to a flat graph."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from reroll.rewrite.capture.export import _export, _to_program, _without_casts
from reroll.rewrite.capture.signature import Example
from reroll.rewrite.ir.interpret import run
from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.records import Origin


class _Named(nn.Module):
    """A module that is called by keyword and gives its results by name, as transformers does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs: Tensor) -> dict[str, Any]:
        inputs.pop("return_dict")
        out = self.module(**inputs)
        out = out if isinstance(out, tuple) else (out,)
        return {f"out{i}": value for i, value in enumerate(out)}


def export(
    module: nn.Module, *inputs: Tensor, dims: Mapping[str, tuple[int | str, ...]] | None = None
) -> Program:
    """The flat Program of a module.

    Its inputs have the names of the arguments of `forward`. `dims` names the dynamic dimensions of
    each; without it, the first is the batch and the others are fixed.
    """
    names = list(inspect.signature(module.forward).parameters)[: len(inputs)]
    examples = [
        Example(name, tensor, (dims or {}).get(name, ("b", *tensor.shape[1:])))
        for name, tensor in zip(names, inputs, strict=True)
    ]
    named = _Named(module.eval())
    exported, _ = _export(named, examples, False, "eager")
    return _without_casts(
        _to_program(named, exported, examples, None, Origin(type(module).__name__))
    )


def calls(graph: fx.Graph) -> list[str]:
    """The names of the functions that a graph calls, in order, without their overloads."""
    return [
        str(getattr(n.target, "overloadpacket", n.target)).removeprefix("aten.")
        for n in graph.nodes
        if n.op == "call_function"
    ]


def outputs(program: Program, *inputs: Tensor) -> tuple[Tensor, ...]:
    """What a Program computes, its inputs given in order."""
    names = [i.name for i in program.inputs]
    with torch.no_grad():
        return tuple(run(program, dict(zip(names, inputs, strict=True))).values())
