"""Links lead somewhere, the index of results has the pages' numbers, and a word has one meaning."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.documents.pages import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
INDEX = ROOT / "docs" / "results" / "README.md"
_LINK = re.compile(r"\[[^\]]*\]\((?P<path>[^)#\s]*)(?:#(?P<anchor>[^)\s]+))?\)")
_NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?")


def prose(page: Path) -> str:
    """The text of a page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The names of a page's headings in links."""
    titles = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower() for title in titles)
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in _LINK.finditer(prose(page)):
        if "://" in link["path"]:
            continue
        target = (page.parent / link["path"]).resolve() if link["path"] else page
        assert target.exists(), link[0]
        if link["anchor"]:
            assert link["anchor"] in anchors(target), link[0]


def rows() -> Iterator[tuple[str, str]]:
    """The numbers of the index, and the pages that they are from."""
    for line in INDEX.read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 4 and "](" in cells[3]:
            link = _LINK.search(cells[3])
            assert link is not None
            yield cells[1], link["path"]


def test_the_index_of_results_has_numbers_of_the_pages() -> None:
    found = list(rows())
    assert len(found) > 30
    for numbers, page in found:
        text = (INDEX.parent / page).read_text("utf-8")
        there = set(_NUMBER.findall(text))
        missing = [n for n in _NUMBER.findall(numbers) if n not in there]
        assert not missing, f"{page} has no {missing}"


def test_every_page_of_results_is_in_the_index() -> None:
    linked = {link["path"] for link in _LINK.finditer(INDEX.read_text("utf-8"))}
    pages = {page.name for page in INDEX.parent.glob("*.md")} - {INDEX.name}
    assert pages <= linked


def test_a_word_has_one_meaning() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text("utf-8")
    words = re.findall(r"^\| ([^|]+) \|", text, flags=re.MULTILINE)
    named = [w.strip() for cell in words if cell not in ("word", "---") for w in cell.split(",")]
    assert len(named) > 60
    assert [w for w, count in Counter(named).items() if count > 1] == []
