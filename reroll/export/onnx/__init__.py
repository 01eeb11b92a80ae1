"""The ONNX target: a Program as graphs that stock runtimes run.

graph.py    building ONNX graphs: values, scopes, hoisting, dead code
plan/       all decisions, before the first node: trips that become one Loop, states as inputs and
            outputs, weights with their stored forms and places in the file that all graphs share
ops/        the lowering of each op: ATen's, norms and projections, attention as ONNX Runtime's own
            operator, token mixers, exits
emit/       translation of a Program's graphs to ONNX nodes, the directory with its description,
            and the comparison of exported graphs with the torch module
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from reroll.bounds import LARGEST, Range
from reroll.errors import ExportError, UsageError
from reroll.export.targets import Progress, Target, option
from reroll.rewrite.ir.program import Program

Kind = Literal["loop", "unrolled", "step"]


class Onnx(Target):
    """ONNX graphs over one weight file, with every state an input and an output.

    `loop` has the depth loop as an ONNX Loop; `unrolled` writes the trips out, for runtimes and
    accelerators without control flow; `step` is one round of trips with a depth for each row, for a
    host that schedules, between `embed` and `head`. All read the same weights.
    """

    name = "onnx"

    graphs: tuple[Kind, ...] = option(("loop", "unrolled"), help="which graphs to write")
    precision: Literal["fp32", "fp16", "int8", "int4"] = option(
        "fp32", help="of weights; activations are fp32, but for fp16"
    )
    runtime: Literal["any", "ort"] = option(
        "any", help="ort: GroupQueryAttention, which only ONNX Runtime has, on caches that grow"
    )
    opset: int = option(
        23,
        within=Range(least=23, most=27),
        help="the version of the ONNX operators; 23 is the first with Attention",
    )
    # hides the method `check` of `Declared`, for which targets have `check_options`
    check: bool = option(  # type: ignore[assignment]
        False, help="run each graph beside the torch module; write nothing if off"
    )
    block: int = option(
        32,
        within=Range(least=16, most=LARGEST),
        help="inputs that share a scale in a quantised weight",
    )

    def check_options(self) -> None:
        if not self.graphs:
            raise UsageError("graphs must name at least one of loop, unrolled, step")
        if self.block & (self.block - 1):
            raise UsageError(
                f"block must be a power of two from 16, not {self.block}",
                where="target onnx, option block",
            )

    def write(
        self, program: Program, directory: Path, progress: Progress | None = None
    ) -> dict[str, Any]:
        try:
            import onnx
            import onnxruntime
        except ImportError as error:
            raise ExportError(
                f"the ONNX target needs {error.name}", hint="pip install 'reroll[onnx]'"
            ) from error
        from reroll.export.onnx.emit.artifact import write

        del onnx, onnxruntime
        return write(self, program, directory, progress)
