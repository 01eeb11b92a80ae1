"""A target of one's own: `reroll export MODEL DIR --load FILE --target numpy --numbers float16`."""

from pathlib import Path
from typing import Any, Literal

import numpy as np

from reroll.errors import ExportError
from reroll.export.targets import Progress, Target, option
from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.weights import evaluate


class Numpy(Target):
    """Weights as NumPy arrays, one file for each entry, beside the text of the program."""

    name = "numpy"

    numbers: Literal["float32", "float16"] = option("float32", help="what weights are stored as")

    def write(
        self, program: Program, directory: Path, progress: Progress | None = None
    ) -> dict[str, Any]:
        total = sum(len(weight.entries) for weight in program.weights.values())
        stored: list[dict[str, Any]] = []
        # one weight after the other is computed, and none is kept
        for name, entry, tensor in evaluate(program.weights, program.source):
            if not tensor.dtype.is_floating_point:
                raise ExportError(f"{name} holds {tensor.dtype}, not floats", where="target numpy")
            file = f"{len(stored):05}.npy"
            np.save(directory / file, tensor.float().numpy().astype(self.numbers))
            stored.append({"weight": name, "entry": entry, "file": file})
            if progress is not None:
                progress(len(stored), total, "weights written")
        (directory / "program.txt").write_text(str(program), encoding="utf-8")
        return {"weights": stored, "numbers": self.numbers}
