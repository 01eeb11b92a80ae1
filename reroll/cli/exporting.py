"""Define the command `export`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

import reroll
from reroll.cli.command import command
from reroll.cli.options import AnyModel, Dtype, Json, Load, Revision, Trust
from reroll.cli.tables import Found, format_number, format_size, new_table
from reroll.cli.terminal import Bars, write, write_json
from reroll.errors import ExportError
from reroll.writing import check_directory, file_sizes, new_directory


@command
def export(
    ctx: typer.Context,
    model: AnyModel,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The directory to write.")],
    target: Annotated[str, typer.Option(help="What to export to: see `reroll targets`.")] = "onnx",
    load: Load = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace DIR if it exists.")
    ] = False,
    dtype: Dtype = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    json_: Json = False,
) -> None:
    """Write a model for another runtime. A target has options of its own: see `reroll targets`.

    The directory appears whole or not at all; if a check fails, there is none.
    """
    from reroll.export.targets import find
    from reroll.rewrite.capture.pictures import picture_inputs

    # all arguments are checked before the model is opened
    chosen = find(target).parse(ctx.args)
    check_directory(directory, overwrite=overwrite, sources=[model, *(load or ())])
    with Bars() as bars:
        start = time.perf_counter()
        bars(0, 0, "capturing")
        program = reroll.capture(
            model, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code
        )
        captured = time.perf_counter() - start
        if pictures := picture_inputs(program.inputs):
            raise ExportError(
                f"{pictures[0]} cannot be exported",
                where=model,
                hint="convert the original without its pictures, and export that",
            )
        sources = program.origin.paths
        with new_directory(directory, overwrite=overwrite, sources=sources) as temporary:
            told = chosen.write(program, temporary, bars)
    seconds = {"capture": captured, **told.pop("seconds", {})}
    found = {
        "source": model,
        "out": str(directory),
        "target": chosen.name,
        **told,
        "sizes": file_sizes(directory),
        "seconds": {**seconds, "total": time.perf_counter() - start},
    }
    write_json(found) if json_ else _print_export(found)


def _print_export(found: Found) -> None:
    """Print what was written, and how far from the original it is."""
    rows = new_table("file", ">size")
    for name, count in found["sizes"].items():
        rows.add_row(name, format_size(count))
    write(rows)
    for kind, graph in found.get("graphs", {}).items():
        if check := graph.get("check"):
            error, most = check["relative_rms_error"], check["tolerance"]
            write(
                f"{kind}: checked, relative RMS error {format_number(error)} "
                f"of at most {format_number(most)}"
            )
    write(f"{found['out']} written in {format_number(found['seconds']['total'])} s")
