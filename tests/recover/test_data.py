"""Text as rows: nothing is lost, nothing held out is trained on, the order is fixed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reroll.errors import UsageError
from reroll.recover.data import Corpus, Rows, documents, make_corpus, take


def letters(text: str) -> list[int]:
    return [ord(c) for c in text]


def corpus(*sources: Any, **options: Any) -> Corpus:
    wishes = {"length": 8, "tokens": 10**6, "held_rows": 2, "pack": "join", **options}
    return make_corpus(sources, letters, **wishes)


def written(path: Path, count: int, start: int = 0) -> Path:
    path.write_text("".join(chr(1000 + start + i) for i in range(count)), encoding="utf-8")
    return path


def rows_of(rows: Rows) -> set[tuple[int, ...]]:
    return {tuple(r[m.bool()].tolist()) for r, m in zip(rows.data, rows.mask, strict=True)}


def test_joined_rows_have_all_tokens_in_stretches(tmp_path: Path) -> None:
    found = corpus(written(tmp_path / "a.txt", 80))
    rows = rows_of(found.train) | rows_of(found.held_out)
    assert rows == {tuple(range(1000 + i, 1008 + i)) for i in range(0, 80, 8)}


def test_what_is_held_out_does_not_depend_on_how_much_is_trained_on(tmp_path: Path) -> None:
    sources = [written(tmp_path / "a.txt", 400), written(tmp_path / "b.txt", 400, 5000)]
    little, much = corpus(*sources, tokens=64), corpus(*sources, tokens=10**6)
    assert torch.equal(little.held_out.data, much.held_out.data)
    assert len(little.train) < len(much.train)
    assert not rows_of(much.train) & rows_of(little.held_out)
    # both sources are in both
    for rows in (little.train, little.held_out):
        assert {min(row) >= 6000 for row in rows_of(rows)} == {True, False}


def test_separate_rows_never_hold_two_documents(tmp_path: Path) -> None:
    parts = ["a" * 20, "b" * 17, "c" * 3, "d" * 40]
    file = tmp_path / "a.txt"
    file.write_text("\f".join(parts), encoding="utf-8")
    found = make_corpus(
        [file], letters, length=19, tokens=1000, held_rows=1, pack="separate", before=[7], end=9
    )
    rows = rows_of(found.train) | rows_of(found.held_out)
    assert all(row[0] == 7 and len(set(row[1:]) - {9}) == 1 for row in rows)
    # a document ends with its end; a rest of fewer than 16 tokens is left out
    assert (7, *[ord("b")] * 17, 9) in rows
    assert not any(ord("c") in row for row in rows)


def test_padding_is_on_the_right_and_masked(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("\f".join(["a" * 16, "b" * 18]), encoding="utf-8")
    found = make_corpus([file], letters, length=20, tokens=1000, held_rows=1, pack="separate")
    assert found.held_out.mask[0].tolist() == [1] * 16 + [0] * 4


def test_repeating_rows_end_with_a_passage_that_they_had_before(tmp_path: Path) -> None:
    file = written(tmp_path / "a.txt", 64 * 40)
    plain = corpus(file, length=64)
    found = corpus(file, length=64, repeats=1.0)
    assert torch.equal(found.held_out.data, plain.held_out.data)
    sizes = set()
    for row, before in zip(found.train.data.tolist(), plain.train.data.tolist(), strict=True):
        # all tokens of this text differ
        size = len(row) - len(set(row))
        assert 8 <= size <= 32
        assert row[:-size] == before[:-size]
        start = row.index(row[-size])
        assert row[start : start + size] == row[-size:]
        sizes.add(size)
    assert len(sizes) > 5
    some = corpus(file, length=64, repeats=0.5)
    changed = (some.train.data != plain.train.data).any(1).float().mean().item()
    assert 0.2 < changed < 0.8
    again = corpus(file, length=64, repeats=0.5)
    assert torch.equal(some.train.data, again.train.data)


def test_jsonl_and_directories(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text(
        "\n".join(json.dumps({"text": t}) for t in ("one", "two")), encoding="utf-8"
    )
    (tmp_path / "a.txt").write_text("zero", encoding="utf-8")
    assert list(documents(tmp_path)) == ["zero", "one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"{", "not JSON"),
        ("a.jsonl", b'{"txt": "x"}', "not JSON with a field"),
        ("a.jsonl", b'{"text": 3}', "is not text"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.txt", b"short", "fills no row"),
    ],
)
def test_bad_text(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        corpus(tmp_path / name)


def test_text_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        corpus(tmp_path / "none.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"no \.txt"):
        corpus(tmp_path / "empty")


@given(st.integers(1, 9), st.integers(0, 40), st.integers(1, 12))
def test_rows_come_again_after_the_last(count: int, start: int, wanted: int) -> None:
    rows = Rows(torch.arange(count)[:, None], torch.ones(count, 1, dtype=torch.long))
    taken = take(rows, start, wanted).data.flatten().tolist()
    assert taken == [(start + i) % count for i in range(wanted)]
