"""Export a model; target and directory are checked before any long work."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import reroll
from reroll.cli.reports import new_table, number, size
from reroll.cli.terminal import results, write
from reroll.errors import ExportError
from reroll.export.targets import find
from reroll.rewrite.capture.pictures import picture_inputs
from reroll.writing import check_directory, new_directory

Progress = Callable[[int, int, str], None]


class Export:
    """A model to export, and a directory that a target writes with options of the command line.

    Raises UsageError if there is no such target or option, or the directory cannot be written.
    """

    def __init__(
        self,
        model: str,
        directory: Path,
        target: str,
        words: Sequence[str],
        *,
        overwrite: bool = False,
        load: Sequence[Path] | None = None,
    ) -> None:
        self.target = find(target).parse(words)
        self.model, self.directory, self.overwrite = model, directory, overwrite
        check_directory(directory, overwrite=overwrite, sources=[model, *(load or ())])

    def run(self, on_progress: Progress, **options: Any) -> dict[str, Any]:
        """Capture the model and write the directory; return what was written, as JSON data."""
        start = time.perf_counter()
        on_progress(0, 0, "capturing")
        program = reroll.capture(self.model, **options)
        captured = time.perf_counter() - start
        if pictures := picture_inputs(program.inputs):
            raise ExportError(
                f"{pictures[0]} cannot be exported",
                where=self.model,
                hint="convert the original without its pictures, and export that",
            )
        sources = program.origin.paths
        with new_directory(self.directory, overwrite=self.overwrite, sources=sources) as temporary:
            found = self.target.write(program, temporary, on_progress)
        files = {
            str(f.relative_to(self.directory)): f.stat().st_size
            for f in sorted(self.directory.rglob("*"))
            if f.is_file()
        }
        seconds = {"capture": captured, **found.pop("seconds", {})}
        return {
            "source": self.model,
            "out": str(self.directory),
            "target": self.target.name,
            **found,
            "sizes": files,
            "seconds": {**seconds, "total": time.perf_counter() - start},
        }


def exported(found: Mapping[str, Any]) -> None:
    """Print what `export` wrote."""
    rows = new_table("file", ">size")
    for name, count in found["sizes"].items():
        rows.add_row(name, size(count))
    results().print(rows)
    for kind, graph in found.get("graphs", {}).items():
        check = graph.get("check")
        if check:
            write(
                f"{kind}: checked, relative RMS error {number(check['relative_rms_error'])} "
                f"of at most {number(check['tolerance'])}"
            )
    write(f"{found['out']} written in {number(found['seconds']['total'])} s")


def targets(found: Sequence[Mapping[str, Any]]) -> None:
    """Print the targets and their options."""
    for each in found:
        write(f"{each['name']}\n\n{each['documentation']}\n")
        rows = new_table("option", "value", "default", "")
        for item in each["options"]:
            default = item["default"]
            shown = ",".join(default) if isinstance(default, list) else number(default)
            rows.add_row(f"--{item['name']}", item["kind"], shown, item["help"])
        results().print(rows)
