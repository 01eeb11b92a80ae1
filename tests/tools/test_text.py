from collections.abc import Iterator
from pathlib import Path

import pytest

from tools import text
from tools.corpora import Document, entry_groups, files, held_out, read, without_gutenberg_notes
from tools.errors import PrepareError
from tools.text import TextSet, build, split


class Package:
    def fetch(self, folder: Path) -> None:
        folder.mkdir()


def one_document(_: Path) -> Iterator[Document]:
    yield Document("all there is\n", held_out=False)


def test_split_keeps_documents_whole_and_in_order() -> None:
    documents = [Document("a\n", False), Document("b\n", True), Document("c\n", False)]
    assert split(documents) == {"train": "a\n\n\nc\n", "val": "b\n"}


def test_a_set_without_held_out_documents_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(text.SETS, "one", TextSet(Package(), one_document, "none"))
    (tmp_path / "work").mkdir()
    with pytest.raises(PrepareError, match="no document for the val split"):
        build("one", tmp_path / "out", tmp_path / "work")
    assert not (tmp_path / "out").exists()


def test_held_out_is_a_fixed_share() -> None:
    names = [f"document {number}" for number in range(1200)]
    picked = [name for name in names if held_out(name, one_in=12)]
    assert 60 < len(picked) < 140
    assert picked == [name for name in names if held_out(name, one_in=12)]


def test_files_come_once_and_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a/c.txt", "a.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    found = files(tmp_path, "*.txt", "**/*.txt")
    assert [name for name, _ in found] == ["a.txt", "a/c.txt", "b.txt"]


def test_read_falls_back_to_latin_1(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for encoding in ("utf-8", "latin-1"):
        path.write_bytes("é".encode(encoding))
        assert read(path) == "é"


def test_gutenberg_notes_go() -> None:
    etext = "legal\n*** START OF THIS ***\nplay\nEnd of Project Gutenberg's play\nlegal"
    assert without_gutenberg_notes(etext) == "play"


def test_entries_begin_in_the_first_column() -> None:
    entries = "preface\none\n  more\ntwo\nthree"
    assert list(entry_groups(entries, first=1, size=2)) == ["one\n  more\ntwo", "three"]
