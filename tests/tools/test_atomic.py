from pathlib import Path

import pytest

from tools.atomic import staged


def test_a_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "folder" / "file"
    with staged(target) as path:
        path.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    assert list(target.parent.iterdir()) == [target]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), staged(tmp_path / "model") as path:
        path.mkdir()
        (path / "half").write_text("")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_failure_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(RuntimeError), staged(target) as path:
        path.write_text("new")
        raise RuntimeError
    assert target.read_text() == "old"


def test_a_folder_that_another_run_made_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with staged(target) as path:
        path.mkdir()
        target.mkdir()
        (target / "theirs").write_text("")
    assert [entry.name for entry in target.iterdir()] == ["theirs"]
    assert list(tmp_path.iterdir()) == [target]
