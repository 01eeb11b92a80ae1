"""Define the commands `show` and `diff`, which print programs and how two differ."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import reroll
from reroll.bounds import COUNT_OR_NONE
from reroll.cli.command import command
from reroll.cli.options import AnyModel, Json, Revision, Trust, integer
from reroll.cli.terminal import Bars, notes, write, write_json
from reroll.errors import UsageError

if TYPE_CHECKING:
    from reroll.rewrite.ir.program import Program


@command
def show(
    model: AnyModel,
    html: Annotated[
        Path | None, typer.Option(help="Write a page here on which the program is seen.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="OTHER", help="With --html: a model to show beside it."),
    ] = None,
    flat: Annotated[
        bool,
        typer.Option("--flat", help="Of a model that is not converted: as captured, not rolled."),
    ] = False,
    lowered: Annotated[
        bool, typer.Option("--lowered", help="The Python code that its graphs are lowered to.")
    ] = False,
    print_after: Annotated[
        list[str] | None,
        typer.Option(help="With --lowered: the graphs after a pass of the lowering, or all."),
    ] = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    json_: Json = False,
) -> None:
    """Print a model's program, or write a page on which it is seen."""
    _check(html, against, lowered, print_after)
    options: dict[str, Any] = {
        "roll": not flat,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
    }
    if html is not None:
        _write_page(model, html, against, json_, options)
        return
    with Bars() as bars:
        bars(0, 0, "capturing")
        program = _program_of(model, **options)
    if lowered:
        from reroll.runtime.lowering.assembly import lowered_text

        sources, after = lowered_text(program, print_after or ())
        if json_:
            write_json({"code": sources, "after": after})
            return
        for name, text in (*after.items(), *sources.items()):
            write(f"==== {'after ' if name in after else ''}{name}\n{text.strip()}\n")
    elif json_:
        from reroll.rewrite.ir.text.serialize import program_to_json

        write_json(program_to_json(program))
    else:
        write(str(program))


def _check(
    html: Path | None, against: str | None, lowered: bool, print_after: list[str] | None
) -> None:
    """Refuse options that do not go together."""
    where = "reroll show"
    if print_after and not lowered:
        raise UsageError(
            "--print-after shows passes of the lowering",
            where=where,
            hint="add --lowered; passes of a conversion are shown by convert --print-after",
        )
    if html is not None and lowered:
        raise UsageError("--html and --lowered exclude each other", where, "give one of them")
    if against is not None and html is None:
        raise UsageError(
            "--against shows two programs on a page",
            where=where,
            hint="add --html FILE; `reroll diff` compares their texts",
        )


def _write_page(
    model: str, file: Path, against: str | None, json_: bool, options: dict[str, Any]
) -> None:
    """Write the page of a model, and of another one beside it."""
    from reroll.evaluate.pages import check_page
    from reroll.evaluate.pages import write as write_file
    from reroll.evaluate.picture import picture
    from reroll.evaluate.program_page import page

    names = [model] if against is None else [model, against]
    # refused before a model is opened
    check_page(file, names)
    # directories are called by their own names, if those differ
    short = [Path(name).resolve().name if Path(name).exists() else name for name in names]
    called = short if len(set(short)) == len(names) else names
    pictures = []
    with Bars() as bars:
        for number, name in enumerate(names):
            bars(number, len(names), f"capturing {name}")
            pictures.append(picture(_program_of(name, **options), called[number]))
    write_file(page(*pictures), file)
    if json_:
        from dataclasses import asdict

        write_json({"page": str(file), "programs": [asdict(each) for each in pictures]})
    else:
        notes().print(f"wrote {file}", markup=False)


@command
def diff(
    a: Annotated[
        str, typer.Argument(metavar="A", help="A model, or a file with a program's text.")
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    context: Annotated[int, integer(COUNT_OR_NONE, "Lines around each change.")] = 3,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    json_: Json = False,
) -> None:
    """Say how the program of B differs from that of A. Exits with 1 if it does, as diff does."""
    from reroll.rewrite.ir.text.compare import diff as differences

    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    with Bars() as bars:
        bars(0, 2, f"opening {a}")
        before = _program_of(a, **options)
        bars(1, 2, f"opening {b}")
        after = _program_of(b, **options)
    text = differences(before, after, context=context)
    if json_:
        write_json({"a": a, "b": b, "same": not text, "diff": text.splitlines()})
    elif text:
        write(text)
    else:
        notes().print("the programs are the same")
    if text:
        raise typer.Exit(1)


def _program_of(name: str, **options: Any) -> Program:
    """The Program of a model, or of a file with a program's text."""
    path = Path(name)
    if path.is_file() and path.suffix != ".gguf":
        try:
            return reroll.parse(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError("this is not the text of a program", where=name) from error
    return reroll.capture(name, **options)
