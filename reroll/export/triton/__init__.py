"""The Triton target: a program as one Python module with its kernels, and its weights.

sites.py             attentions, recurrences and short convolutions, which have state
linears.py           linear layers that are one kernel with their norm, low-rank residual and gate
graphs.py            its graphs as Python functions
launches.py          its kernels as text with its constants in them, and what launches them
module.py            the text of model.py, and the other files
precompile.py        binaries of the kernels, compiled without a GPU
bundle_*.py          the common parts of all bundles, copied as they are
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reroll.errors import ExportError, UsageError
from reroll.export.targets import Progress, Target, option
from reroll.rewrite.ir.program import Program

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")


class Triton(Target):
    """A Python bundle that imports torch and triton only: model.py, weights, tokenizer, manifest.

    For causal models. model.py has the kernels with the program's shapes in them, its graphs line
    by line, prefill and decoding (a CUDA graph for each batch size), and `selftest`, which compares
    every kernel with its definition on the machine that runs it. Block sizes are those without
    spills on each GPU of `arch`. Its speed on a GPU has not been measured.
    """

    name = "triton"

    arch: tuple[str, ...] = option(("sm_90", "sm_80"), help="GPUs: sm_80, sm_90, sm_100, gfx942")
    precompiled: bool = option(False, help="also write binaries of the kernels for each GPU")

    def check_options(self) -> None:
        wrong = [a for a in self.arch if a not in ARCHS]
        if wrong or not self.arch:
            raise UsageError(
                f"unknown GPUs: {', '.join(wrong)}" if wrong else "name a GPU",
                where="target triton, option arch",
                hint=f"known are {', '.join(ARCHS)}",
            )

    def write(
        self, program: Program, directory: Path, progress: Progress | None = None
    ) -> dict[str, Any]:
        try:
            import triton
        except ImportError as error:
            raise ExportError(
                "the Triton target needs triton", hint="pip install 'reroll[triton]'"
            ) from error
        from reroll.export.triton.module import write

        del triton
        return write(self, program, directory, progress)
