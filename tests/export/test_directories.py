"""A directory that is there whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from reroll.errors import UsageError
from reroll.export.directories import new_directory


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
        "from reroll.export.directories import new_directory\n"
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
