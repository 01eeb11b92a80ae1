"""Find tokenizers of models and Programs, and cut text into windows of token ids."""

from __future__ import annotations

import codecs
import logging
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reroll.errors import UsageError
from reroll.rewrite.analysis.samples import sample_text
from reroll.rewrite.ir.program import Program

log = logging.getLogger(__name__)

# files that only a tokenizer has; the first one found gives the tokenizer's directory
_MARKS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")

# more characters per token are rare, so longer text is cut before it is tokenized
_CHARACTERS = 16


def tokenizer_of(program: Program) -> Any | None:
    """Open the transformers tokenizer among a Program's files; None if there is none."""
    files = program.origin.files
    for mark in _MARKS:
        if mark in files and Path(files[mark]).is_file():
            return open_tokenizer(str(Path(files[mark]).parent))
    if program.origin.model.endswith(".gguf") and Path(program.origin.model).is_file():
        return open_tokenizer(program.origin.model)
    return None


def open_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> Any | None:
    """Open the tokenizer of a hub id, a directory or a `.gguf` file.

    If there is none, log the reason and return None.
    """
    from transformers import AutoTokenizer

    path = Path(name)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if path.suffix == ".gguf":
        name, options["gguf_file"] = str(path.parent), path.name
    if path.exists():
        options["local_files_only"] = True
    else:
        options["revision"] = revision
    try:
        return AutoTokenizer.from_pretrained(name, **options)
    # unreadable tokenizers raise errors of many types
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        log.info("%s has no tokenizer: %s: %s", name, type(error).__name__, reason)
        return None


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokenize a text without special tokens."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [int(i) for i in ids]


def special_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the special tokens that the tokenizer puts before and after a text."""
    bare = plain_ids(tokenizer, "a")
    whole = [int(i) for i in tokenizer("a")["input_ids"]]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []


def read_text(source: str | Path | None) -> str:
    """Read the text in a file; None gives the included sample.

    A `str` is the text itself, a `Path` is a file. Raises UsageError if the file is not text.
    """
    if source is None:
        return sample_text()
    if isinstance(source, str):
        return source
    try:
        text = source.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(source) from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"the text cannot be read: {reason}", where=str(source)) from error
    if "\0" in text:
        raise UsageError("the file is binary, not text", where=str(source))
    if not text.strip():
        raise UsageError("the text is empty", where=str(source))
    return text


def not_utf8(file: Path) -> UsageError:
    """Build the error for a file that is not UTF-8, with the position of the first invalid byte."""
    decoder, position = codecs.getincrementaldecoder("utf-8")(), 0
    with file.open("rb") as stream, suppress(UnicodeDecodeError):
        while piece := stream.read(2**20):
            waiting = len(decoder.getstate()[0])
            try:
                decoder.decode(piece)
            except UnicodeDecodeError as error:
                position += error.start - waiting
                raise
            position += len(piece)
    return UsageError(
        f"the file is not UTF-8 text: byte {position} is none of it",
        where=str(file),
        hint="convert it: iconv -f LATIN1 -t UTF-8, or from whatever it is in",
    )


def check_utf8(text: str, where: str) -> None:
    """Raise UsageError for command-line text that was not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        position = len(os.fsencode(text[: error.start]))
        raise UsageError(
            f"the text is not UTF-8: byte {position} is none of it",
            where=where,
            hint="set the terminal, or whatever writes the text, to UTF-8",
        ) from error


@dataclass(frozen=True)
class Windows:
    """Windows of a text, each with the special tokens that the tokenizer puts around a text.

    `ids` is [windows, length]; the first `prefix` tokens of each window and the last `suffix` are
    special. `cut` says that the text continues after the last window.
    """

    ids: Tensor
    prefix: int
    suffix: int
    cut: bool


def make_windows(
    text: str, tokenizer: Any, length: int, max_tokens: int | None, *, closing: bool
) -> Windows:
    """Cut a text into windows of `length` tokens that do not overlap; a rest is left out.

    A text that is shorter than one window gives one shorter window. `closing` keeps the special
    tokens after a text, which encoders need. Raises UsageError if length or text is too short.
    """
    before, after = special_ids(tokenizer)
    after = after if closing else []
    room = length - len(before) - len(after)
    if room < 2:
        raise UsageError(f"a window of {length} tokens is too short", hint="8 or more make sense")
    whole = len(text)
    if max_tokens is not None:
        text = text[: _CHARACTERS * max(max_tokens, length)]
    ids = plain_ids(tokenizer, text)
    if len(ids) < 2:
        raise UsageError("the text has fewer than two tokens", hint="give more text")
    count = max(len(ids) // room, 1)
    if max_tokens is not None:
        count = min(count, max(max_tokens // length, 1))
    rows = [before + ids[i * room : (i + 1) * room] + after for i in range(count)]
    cut = len(ids) - count * room >= room or len(text) < whole
    return Windows(torch.tensor(rows, dtype=torch.long), len(before), len(after), cut)
