"""Tables of results are what the files of results say, and nothing is typed beside them."""

from __future__ import annotations

import json
import re

import pytest

from benchmarks.tables import PAGES, TABLE, updated

FILES = sorted((PAGES / "data").glob("*.json"))
PAGE_FILES = sorted(PAGES.glob("*.md"))


@pytest.mark.parametrize("page", PAGE_FILES, ids=lambda page: page.stem)
def test_a_page_has_the_tables_of_its_files(page):
    text = page.read_text(encoding="utf-8")
    assert updated(text) == text, "python -m benchmarks.tables writes them"


# figures of the index are held against the pages by the tests of documents
@pytest.mark.parametrize("page", [page for page in PAGE_FILES if page.stem != "README"])
def test_no_table_is_typed(page):
    typed = TABLE.sub("", page.read_text(encoding="utf-8"))
    assert not re.findall(r"^\|.*$", typed, re.MULTILINE)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_of_results_says_what_made_it(file):
    content = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(content, dict) and "columns" in content:
        assert content["command"].startswith(("python ", "reroll ", "TRITON_INTERPRET=1 python "))
        assert re.fullmatch(r"[0-9a-f]{7,}\+?", content["commit"])
        assert content["rows"]
