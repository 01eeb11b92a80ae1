"""Write a converted model, and summarise what the conversion changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from reroll.rewrite.analysis.program_distance import size
from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.records import Step
from reroll.writing import Paths, check_directory

Progress = Callable[[int, int, str], None]


class Conversion:
    """A directory to write, which is checked when it is created, before hours of work.

    `sources` are the files and directories that the result is made from. Raises UsageError as
    `check_directory` does.
    """

    def __init__(self, out: str | Path, *, overwrite: bool = False, sources: Paths = ()) -> None:
        self.out = Path(out)
        self.overwrite = overwrite
        self.check(sources)

    def check(self, sources: Paths) -> None:
        """Raise UsageError unless the directory can be written and replaces none of `sources`."""
        check_directory(self.out, overwrite=self.overwrite, sources=sources)

    def save(self, program: Program, on_progress: Progress | None = None) -> None:
        """Write the directory; if that fails, it is absent or as it was."""

        def report(done: int, total: int) -> None:
            if on_progress is not None:
                on_progress(done, total, f"writing {self.out}")

        program.save(str(self.out), overwrite=self.overwrite, progress=report)

    def summary(
        self, model: str, before: Program, after: Program, seconds: Mapping[str, float]
    ) -> dict[str, Any]:
        """Summarise the conversion as JSON data: sizes, costs, loops, passes, files."""
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
