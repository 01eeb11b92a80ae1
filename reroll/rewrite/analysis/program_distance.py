"""Distances between Programs, measured by running them on the same text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reroll.errors import ProgramError
from reroll.rewrite.analysis import tolerances
from reroll.rewrite.analysis.context import Context
from reroll.rewrite.analysis.costs import flops_per_token, keeps_state, state_bytes
from reroll.rewrite.analysis.distance import Distance
from reroll.rewrite.analysis.samples import random_inputs, rows_of, token_input
from reroll.rewrite.ir.interpret import run, widened
from reroll.rewrite.ir.matching import shape
from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.weights.store import WeightStore

LENGTH = 256
SHORTEST = 8
# the largest perplexity that is reported
MOST = 1e300
MAX_TOKENS = 1024
# elements of logits that one measurement keeps in memory
MAX_LOGITS = 2**28
CONTEXTS = (1024, 4096)


def size(program: Program) -> dict[str, Any]:
    """Return a Program's parameters, bytes, operations per token and bytes of state."""
    return {
        "parameters": program.parameters(),
        "bytes": program.weights.bytes(),
        "flops_per_token": flops_per_token(program),
        "state_bytes": {str(c): state_bytes(program, c) for c in CONTEXTS},
    }


@dataclass(frozen=True)
class Violation:
    """Output in which two programs that should agree do not."""

    output: str
    error: float
    tolerance: float


def difference(before: Program, after: Program) -> Violation | float:
    """Compute the largest relative RMS error between two programs that should agree.

    Both run in fp32 on random inputs, with and without padding. Their weights are not rounded to
    half precision, so that the error separates a wrong rewrite from rounding. Return a `Violation`
    at the first output whose error exceeds the tolerance.
    """
    worst = 0.0
    programs = [_in_fp32(p) for p in (before, after)]
    store = WeightStore()
    dtype = programs[0].dtype if programs[0].dtype == torch.float64 else torch.float32
    tolerance = tolerances.forward(dtype)
    for padded in (False, True):
        inputs = random_inputs(before, padded=padded)
        expected, actual = (run(p, inputs, weights=store.weights(p), dtype=dtype) for p in programs)
        for name, reference in expected.items():
            if name not in actual:
                return Violation(name, math.inf, tolerance)
            error = tolerances.relative_rms(actual[name], reference)
            worst = max(worst, error)
            if not error <= tolerance:
                return Violation(name, error, tolerance)
    return worst


def _in_fp32(program: Program) -> Program:
    half = program.dtype in (torch.bfloat16, torch.float16)
    return widened(program, torch.float32) if half else program


class Measurer:
    """Comparison of programs on the same tokens; each program's outputs are computed once."""

    def __init__(self, program: Program, context: Context) -> None:
        self.context = context
        self.generates = keeps_state(program)
        self._outputs: list[tuple[Program, list[Tensor]]] = []
        length = LENGTH
        self.inputs, self.source = _sample(program, context, length)
        while not self._runs(program, shorter := length // 2):
            # a model with a table of positions takes no more tokens than that has rows
            length = shorter
            self.inputs, self.source = _sample(program, context, length)

    def _runs(self, program: Program, shorter: int) -> bool:
        """Whether a program takes the inputs; raise its ProgramError if they cannot be shorter."""
        try:
            self.outputs(program)
        except ProgramError:
            if shorter < SHORTEST or self.source == "random":
                raise
            return False
        return True

    def outputs(self, program: Program) -> list[Tensor]:
        """Compute the measured output for each sample, in fp32 from the weights as stored."""
        for known, outputs in self._outputs:
            if known is program:
                return outputs
        name = measured_output(program)
        outputs = []
        for number, inputs in enumerate(self.inputs):
            self.context.progress(number, len(self.inputs), "measuring")
            outputs.append(self.context.outputs(program, inputs)[name])
        self._outputs.append((program, outputs))
        return outputs

    def renamed(self, program: Program, same: Program) -> None:
        """Register the outputs of `program` under `same`, which computes the same."""
        self._outputs = [(same if p is program else p, o) for p, o in self._outputs]

    def keep(self, programs: Sequence[Program]) -> None:
        """Drop the outputs and weights of all other programs."""
        self._outputs = [(p, o) for p, o in self._outputs if any(p is q for q in programs)]
        self.context.store.keep(programs)

    def compare(self, reference: Program, program: Program) -> dict[str, Any]:
        """Return the relative RMS error; for logits also KL (nats), top-1 agreement, perplexity."""
        logits = "logits" in measured_output(program)
        predicts = logits and self.source == "text" and self.generates
        distance = Distance(logits)
        pairs = zip(self.outputs(reference), self.outputs(program), strict=True)
        for inputs, (a, b) in zip(self.inputs, pairs, strict=True):
            targets = _targets(inputs) if predicts else None
            distance.add(a.flatten(0, -2), b.flatten(0, -2), targets)
        result: dict[str, Any] = {
            "inputs": self.source,
            "relative_rms_error": distance.relative_rms_error,
        }
        if not logits:
            return result
        result |= {"kl": distance.kl, "top1_agreement": distance.top1_agreement}
        if predicts:
            result["perplexity"] = {
                # a broken model's perplexity may be infinite, which JSON has no number for
                name: min(distance.perplexity(side) or 0.0, MOST)
                for side, name in enumerate(("before", "after"))
            }
        return result | {"tokens": distance.positions}


def _targets(inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the next token of each position [time], -100 after the last."""
    ids = next(t for t in inputs.values() if t.dtype == torch.long and t.dim() == 2).flatten()
    return F.pad(ids[1:], (0, 1), value=-100)


def _sample(
    program: Program, context: Context, length: int
) -> tuple[list[Mapping[str, Tensor]], str]:
    """Return inputs, one row each, and their kind: "text", "random tokens" or "random"."""
    if token_input(program) is None:
        return [random_inputs(program, rows=1, seed=s) for s in range(4)], "random"
    width = max(_width(program), 1)
    count = max(2, min(MAX_TOKENS, MAX_LOGITS // (4 * width)))
    tokens, source = context.some_tokens(program, min(count, length))
    count = min(count, tokens.numel())
    return rows_of(program, tokens[:count], length), source


def measured_output(program: Program) -> str:
    """Return the name of the measured output: the logits if there are any, else the first."""
    return next((n for n in program.outputs if "logits" in n), program.outputs[0])


def _width(program: Program) -> int:
    """Return the size of the last dimension of the measured output."""
    output = next(n for n in reversed(program.graph.nodes) if n.op == "output")
    values = output.args[0] if isinstance(output.args[0], tuple | list) else output.args
    position = program.outputs.index(measured_output(program))
    dims = shape(values[position])
    return dims[-1] if dims and isinstance(dims[-1], int) else 1
