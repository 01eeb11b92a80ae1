"""Where a converted model goes, and what became of the model."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from reroll.errors import ExportError, UsageError
from reroll.rewrite.passes.measure import size
from reroll.rewrite.program import Program, Step

Progress = Callable[[int, int, str], None]


class Conversion:
    """A directory to be written; whether it can be is checked at once, before hours of work.

    Raises UsageError if the directory exists and may not be replaced, or cannot be made.
    """

    def __init__(self, out: str | Path, *, overwrite: bool = False) -> None:
        self.out = Path(out)
        self.overwrite = overwrite
        if os.path.lexists(self.out):
            if not self.out.is_dir():
                raise UsageError("this is a file, not a directory", where=str(out))
            if not overwrite and any(self.out.iterdir()):
                raise UsageError(
                    "the directory exists and is not empty",
                    where=str(out),
                    hint="name another one, or give --overwrite",
                )
        # permissions alone do not say whether a file system can be written to
        place = next(p for p in self.out.absolute().parents if p.exists())
        try:
            with tempfile.TemporaryDirectory(dir=place, prefix=".reroll-"):
                pass
        except OSError as error:
            raise UsageError(
                f"cannot write in {place}: {error.strerror}", where=str(out)
            ) from error

    def save(self, program: Program, on_progress: Progress | None = None) -> None:
        """Write the directory; it is absent or as it was if that fails."""

        def report(done: int, total: int) -> None:
            if on_progress is not None:
                on_progress(done, total, f"writing {self.out}")

        try:
            program.save(str(self.out), overwrite=self.overwrite, progress=report)
        except OSError as error:
            reason = error.strerror or str(error)
            raise ExportError(f"cannot be written: {reason}", where=str(self.out)) from error

    def summary(
        self, model: str, before: Program, after: Program, seconds: Mapping[str, float]
    ) -> dict[str, Any]:
        """What became of the model, as JSON data."""
        old, new = size(before), size(after)
        return {
            "model": model,
            "out": str(self.out),
            "parameters": {"before": old["parameters"], "after": new["parameters"]},
            "bytes": {"before": old["bytes"], "after": new["bytes"]},
            "flops_per_token": {
                "before": old["flops_per_token"],
                "after": new["flops_per_token"],
            },
            "state_bytes": {
                context: {"before": count, "after": new["state_bytes"][context]}
                for context, count in old["state_bytes"].items()
            },
            "loops": [
                {"name": p.name, "trips": p.trips, "period": p.period, "layers": p.layers}
                for p in after.loops
            ],
            "passes": [_step(s) for s in after.origin.steps[len(before.origin.steps) :]],
            "remarks": list(after.origin.remarks),
            "files": {
                str(f.relative_to(self.out)): f.stat().st_size
                for f in sorted(self.out.rglob("*"))
                if f.is_file()
            },
            "seconds": {**seconds, "total": sum(seconds.values())},
        }


def _step(step: Step) -> dict[str, Any]:
    return {
        "pass": step.text,
        "seconds": step.seconds,
        "remarks": list(step.remarks),
        "measured": dict(step.measured),
    }
