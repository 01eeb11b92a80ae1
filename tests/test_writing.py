"""What is written: refused before any work, or there whole or not at all."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from reroll import writing
from reroll.errors import ExportError, UsageError
from reroll.writing import (
    check_directory,
    check_file,
    filled_directory,
    new_directory,
    new_file,
)


def write(target: Path, text: str, *, overwrite: bool = False) -> None:
    with new_directory(target, overwrite=overwrite) as directory:
        (directory / "file").write_text(text)
        (directory / "sub").mkdir()
        (directory / "sub" / "file").write_text(text)
        assert not (target / "file").exists() or (target / "file").read_text() != text


def names(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


def test_it_appears_at_the_end(tmp_path: Path) -> None:
    write(tmp_path / "a" / "out", "new")
    assert (tmp_path / "a" / "out" / "sub" / "file").read_text() == "new"
    assert names(tmp_path / "a") == ["out"]


def test_an_empty_directory_is_as_good_as_none(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", "new")
    assert names(tmp_path) == ["out"]


def test_overwriting_replaces_everything(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    (tmp_path / "out" / "more").write_text("old")
    write(tmp_path / "out", "new", overwrite=True)
    assert names(tmp_path / "out") == ["file", "sub"]
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_error_leaves_what_was_there(tmp_path: Path, overwrite: bool) -> None:
    if overwrite:
        write(tmp_path / "out", "old")
    with (
        pytest.raises(KeyboardInterrupt),
        new_directory(tmp_path / "out", overwrite=overwrite) as directory,
    ):
        (directory / "file").write_text("half")
        raise KeyboardInterrupt
    assert names(tmp_path) == (["out"] if overwrite else [])
    if overwrite:
        assert (tmp_path / "out" / "file").read_text() == "old"


@pytest.mark.parametrize("kind", ["full", "file", "link"])
def test_what_is_not_ours_to_replace(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "out"
    if kind == "full":
        write(target, "mine")
    elif kind == "file":
        target.write_text("mine")
    else:
        (tmp_path / "elsewhere").mkdir()
        target.symlink_to(tmp_path / "elsewhere")
    for overwrite in [False] if kind == "full" else [False, True]:
        with pytest.raises(UsageError):
            write(target, "new", overwrite=overwrite)
    assert len(names(tmp_path)) == (2 if kind == "link" else 1)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write"):
        write(tmp_path / "file" / "out", "new")


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from reroll.writing import new_directory\n"
        "with new_directory(sys.argv[1]) as directory:\n"
        "    (directory / 'file').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=False)
    assert len(names(tmp_path)) == 1
    assert not (tmp_path / "out").exists()
    # one of a process that lives is left alone
    alive = tmp_path / f".out.{os.getppid()}.x.reroll-tmp"
    alive.mkdir()
    write(tmp_path / "out", "new")
    assert names(tmp_path) == sorted([alive.name, "out"])


# ---- one answer to whether it can be written


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "home" / "model"
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    return path


PLACES = {
    "the model itself": lambda model: model,
    "the model by another path": lambda model: model.parent / ".." / "home" / "model",
    "what holds it": lambda model: model.parent,
    "inside of it": lambda model: model / "new" / "out",
    "a link to it": lambda model: _link(model.parent / "link", model),
    "a link to nothing": lambda model: _link(model.parent / "link", model.parent / "no"),
    "a link to itself": lambda model: _link(model.parent / "link", model.parent / "link"),
    "a name that is too long": lambda model: model.parent / ("n" * 256),
    "a path that is too long": lambda model: model.parent.joinpath(*["n" * 200] * 20),
    "below a file": lambda model: model / "config.json" / "out",
    "a file": lambda model: model / "config.json",
}


def _link(link: Path, to: Path) -> Path:
    link.symlink_to(to)
    return link


@pytest.mark.parametrize("place", PLACES)
def test_places_that_are_refused(model: Path, place: str) -> None:
    target = PLACES[place](model)
    for overwrite in (False, True):
        with pytest.raises(UsageError) as refused:
            check_directory(target, overwrite=overwrite, sources=[model, "no/such-hub-id"])
        assert refused.value.where
        with pytest.raises(UsageError), new_directory(target, overwrite=overwrite, sources=[model]):
            raise AssertionError("work began")
    assert names(model) == ["config.json"]


@pytest.mark.parametrize("name", [".", "..", "./", "../work"])
def test_the_directory_that_a_command_runs_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(UsageError, match="runs in"):
        check_directory(name, overwrite=True)


def test_the_longest_name_is_written(tmp_path: Path) -> None:
    name = "\N{LATIN SMALL LETTER E WITH ACUTE}" * 127
    write(tmp_path / name, "new")
    write(tmp_path / name, "newer", overwrite=True)
    assert names(tmp_path) == [name]


def test_a_place_that_cannot_be_written_is_told_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write everywhere, so the system's answer is simulated."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(writing.tempfile, "mkdtemp", refuse)
    for check in (check_directory, check_file):
        with pytest.raises(UsageError, match="Read-only") as refused:
            check(tmp_path / "out")
        assert refused.value.hint


def test_a_mounted_disk_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    with pytest.raises(UsageError, match="mounted"):
        check_directory(tmp_path)


def test_files_beside_what_is_read(model: Path) -> None:
    check_file(model / "page.html", sources=[model])
    for target in (model / "config.json", model, model / "no" / "file"):
        with pytest.raises(UsageError):
            check_file(target, overwrite=True, sources=[model / "config.json"])


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_file(tmp_path / "file") as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert names(tmp_path) == []
    with new_file(tmp_path / "file") as part:
        part.write_text("whole")
    with pytest.raises(UsageError, match="exists"):
        check_file(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "whole"
    assert names(tmp_path) == ["file"]


def test_files_of_a_directory_that_has_others(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    (tmp_path / "out" / "others").write_text("kept")
    with filled_directory(tmp_path / "out") as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "file").write_text("new")
        assert (tmp_path / "out" / "sub" / "file").read_text() == "old"
    assert (tmp_path / "out" / "sub" / "file").read_text() == "new"
    assert names(tmp_path / "out") == ["file", "others", "sub"]


def _new(target: Path) -> None:
    with new_directory(target, overwrite=True) as directory:
        (directory / "file").write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _filled(target: Path) -> None:
    with filled_directory(target) as directory:
        (directory / "file").write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("fill", [_new, _filled])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, fill: Callable[[Path], None]) -> None:
    write(tmp_path / "out", "old")
    with pytest.raises(ExportError, match="No space left") as told:
        fill(tmp_path / "out")
    assert told.value.where == str(tmp_path / "out")
    assert "make room" in str(told.value.hint)
    assert (tmp_path / "out" / "file").read_text() == "old"
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["file", "sub"]


def test_what_somebody_else_wrote_meanwhile_is_kept(tmp_path: Path) -> None:
    with pytest.raises(ExportError), new_directory(tmp_path / "out") as directory:
        (directory / "file").write_text("new")
        write(tmp_path / "out", "theirs")
    assert (tmp_path / "out" / "file").read_text() == "theirs"
    assert names(tmp_path) == ["out"]


def test_where_names_cannot_be_exchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two renames then: an old directory that is left behind gets its place back."""
    monkeypatch.setattr(writing, "_exchange", lambda a, b: False)
    write(tmp_path / "out", "old")
    write(tmp_path / "out", "new", overwrite=True)
    assert names(tmp_path) == ["out"]
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    (tmp_path / "out").rename(tmp_path / f".out.{process.pid}.x.old.reroll-tmp")
    with pytest.raises(ExportError), new_directory(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "file").read_text() == "new"
