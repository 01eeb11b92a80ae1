"""Prepare rows of text to train on: documents, held-out rows, packing, and a fixed order."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from reroll.errors import UsageError
from reroll.evaluate.tokenizing import not_utf8

# with `pack=separate`, rows with fewer tokens are left out
SHORTEST = 16
# number of characters that are tokenized at once
PIECE = 1_000_000

Tokenize = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class Rows:
    """Rows in memory: token ids [rows, length], or images [rows, channels, height, width].

    `mask` [rows, length] is 1 at tokens, or at the positions of an image, and 0 at padding.
    """

    data: Tensor
    mask: Tensor

    def __len__(self) -> int:
        return len(self.data)

    def pick(self, numbers: Sequence[int]) -> Rows:
        """Return the rows with these numbers, in this order."""
        return Rows(self.data[numbers], self.mask[numbers])

    def split(self, size: int) -> list[Rows]:
        """Split into pieces of at most `size` rows."""
        parts = zip(self.data.split(size), self.mask.split(size), strict=True)
        return [Rows(*part) for part in parts]


class RowSource(Protocol):
    """Rows that are in memory, or are read when they are picked."""

    def __len__(self) -> int: ...

    def pick(self, numbers: Sequence[int]) -> Rows: ...


@dataclass(frozen=True)
class Corpus:
    """Rows to train on, in order, and held-out rows to measure on."""

    train: RowSource
    held_out: RowSource


def documents(source: str | Path) -> Iterator[str]:
    """Yield the documents of a file, a directory, or a Hugging Face dataset (`name[:split]`).

    A `.jsonl` file has one document in the field `text` of each line. Any other file is one
    document, or several separated by form feeds. Files of a directory come in the order of their
    paths. Raises UsageError if there are none, or if one cannot be read.
    """
    path = Path(source)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".md", ".jsonl"))
        if not files:
            raise UsageError("the directory has no .txt, .md or .jsonl file", where=str(source))
        for file in files:
            yield from documents(file)
    elif path.is_file():
        yield from _in_file(path)
    elif path.suffix or isinstance(source, Path):
        raise UsageError("there is no such file", where=str(source))
    else:
        yield from _in_dataset(str(source))


def _in_file(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as file:
            if path.suffix == ".jsonl":
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield _field(line, f"{path}, line {number}")
                return
            yield from (part for part in file.read().split("\f") if part.strip())
    except UnicodeDecodeError as error:
        raise not_utf8(path) from error
    except OSError as error:
        raise UsageError(f"the file cannot be read: {error.strerror}", where=str(path)) from error


def _field(line: str, where: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError("the line is not JSON with a field `text`", where=where) from error
    if not isinstance(text, str):
        raise UsageError("the field `text` is not text", where=where)
    return text


def _in_dataset(name: str) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UsageError(
            "there is no such file, and Hugging Face datasets is not installed",
            where=name,
            hint="pip install datasets, or give a file or a directory",
        ) from error
    name, _, split = name.partition(":")
    for record in load_dataset(name, split=split or "train", streaming=True):
        if record.get("text"):
            yield record["text"]


def make_corpus(
    sources: Sequence[str | Path],
    tokenize: Tokenize,
    *,
    length: int,
    tokens: int,
    held_rows: int,
    pack: Literal["join", "separate"],
    before: Sequence[int] = (),
    end: int | None = None,
    repeats: float = 0.0,
    seed: int = 0,
) -> Corpus:
    """Build rows of at most about `tokens` training tokens, from the sources in turn.

    The first rows of each source are held out, `held_rows` in all. Which these are depends on the
    sources only, so that no longer run trains on them. `before` is put at the start of every row,
    and `end` after every document. `repeats` is the share of training rows that end with a copy of
    an earlier passage. The order of the training rows, and which of them repeat what, depend on
    `seed` only.

    Raises UsageError if a source cannot be read, or if the text is too short for one row each.
    """
    train: list[list[int]] = []
    held: list[list[int]] = []
    room = length - len(before)
    each = -(-held_rows // len(sources))
    wanted = -(-tokens // len(sources)) + each * room
    for source in sources:
        rows = _packed(_tokenized(source, tokenize, wanted, end), room, pack)
        held += rows[:each]
        train += rows[each : each + -(-tokens // (len(sources) * length))]
    if not train or not held:
        raise UsageError(
            f"the text fills no row of {length} tokens beside the {each} that are held out",
            where=", ".join(map(str, sources)),
            hint="give more text, or a smaller length",
        )
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [train[i] for i in order]
    chance = random.Random(seed)
    shuffled = [_repeating(r, chance) if chance.random() < repeats else r for r in shuffled]
    return Corpus(_tensors(shuffled, before, length), _tensors(held, before, length))


def _tokenized(
    source: str | Path, tokenize: Tokenize, wanted: int, end: int | None
) -> Iterator[list[int]]:
    """Yield the documents of a source as token ids, until there are `wanted` tokens."""
    count = 0
    for document in documents(source):
        ids: list[int] = []
        for start in range(0, len(document), PIECE):
            ids += tokenize(document[start : start + PIECE])
            if count + len(ids) >= wanted:
                break
        if end is not None:
            ids.append(end)
        count += len(ids)
        yield ids
        if count >= wanted:
            return


def _packed(documents: Iterator[list[int]], room: int, pack: str) -> list[list[int]]:
    """Pack documents into rows of at most `room` tokens."""
    if pack == "separate":
        rows = [ids[i : i + room] for ids in documents for i in range(0, len(ids), room)]
        return [row for row in rows if len(row) >= min(SHORTEST, room)]
    joined = [i for ids in documents for i in ids]
    return [joined[i : i + room] for i in range(0, len(joined) - room + 1, room)]


def _repeating(row: list[int], chance: random.Random) -> list[int]:
    """Replace the end of a row, an eighth to a half of it, by a copy of an earlier passage."""
    size = chance.randint(-(-len(row) // 8), len(row) // 2)
    start = chance.randint(0, len(row) - 2 * size)
    return row[:-size] + row[start : start + size]


def _tensors(rows: Sequence[list[int]], before: Sequence[int], length: int) -> Rows:
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for number, row in enumerate(rows):
        whole = [*before, *row]
        ids[number, : len(whole)] = torch.tensor(whole)
        mask[number, : len(whole)] = 1
    return Rows(ids, mask)


def take(rows: RowSource, start: int, count: int) -> Rows:
    """Return `count` rows from number `start` on; the first row follows the last."""
    return rows.pick([(start + i) % len(rows) for i in range(count)])
