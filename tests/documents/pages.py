"""The code on a page of the documents, and what it prints."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

_BLOCK = re.compile(
    r"(<!-- (?P<name>\w+) -->\n)?```python\n(?P<code>.*?)```\n"
    r"(\n```text\n(?P<output>.*?)```\n)?",
    re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A block of Python; `name` is that of the comment above it, `output` the text below it."""

    name: str
    code: str
    output: str | None
    line: int


def blocks(page: Path) -> Iterator[Block]:
    """The blocks of Python on a page, in order."""
    text = page.read_text(encoding="utf-8")
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("code"))
        yield Block(match["name"] or "", match["code"], match["output"], line)
