"""The documents say where things are, and the picture of the rooms is that of the tree."""

from __future__ import annotations

import re

from tools.architecture import PAGE, ROOT, page

_PATH = re.compile(
    r"`((?:reroll|rewrite|runtime|export|passes|kernels|mixers|recover|evaluate|tests|benchmarks"
    r"|tools|examples)/[\w/.-]*)`"
)


def test_the_picture_is_that_of_the_tree() -> None:
    assert PAGE.read_text("utf-8") == page(), "run python -m tools.architecture"


def test_what_documents_name_is_there() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "reroll").rglob("*.py")]
    named = [
        (file, found[1]) for file in pages for found in _PATH.finditer(file.read_text("utf-8"))
    ]
    assert len(named) > 20
    assert [(f.name, path) for f, path in named if not (ROOT / path).exists()] == []
