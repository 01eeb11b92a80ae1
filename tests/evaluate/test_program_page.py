"""The page of a program: it parses, needs nothing else, escapes names, and fits its window."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

import reroll
from reroll.evaluate import pages
from reroll.evaluate.picture import picture
from reroll.evaluate.program_page import page
from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.records import Step
from tests import captured
from tests.evaluate import browser

VOID = {"meta"}
EVIL = "<script>alert('x')</script>\"&"
PASSES = {
    "llama": "tie(blocks=2), relax(rank=2), window(size=3), insert_exits(at=[1, 2])",
    "gemma3": "linearize(mixer=retention, keep=[0])",
    "smollm3": "tie(blocks=2), relax(budget=0.2, step=2), window(size=3, keep=[0, 5])",
    "bert": "tie(blocks=2)",
    "whisper": "tie(blocks=2)",
    "lfm2": "",
}


class Reader(HTMLParser):
    """Reads a page, and fails if a tag is not closed by its own."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), self.get_starttag_text()
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def rewritten(name: str) -> Program:
    program = captured.captured(name)
    return reroll.run_passes(program, PASSES[name], measure=False) if PASSES[name] else program


def both(name: str) -> str:
    return page(picture(rewritten(name), "after"), picture(captured.captured(name), "before"))


@pytest.mark.parametrize("name", PASSES)
def test_the_page_needs_nothing_else(name: str) -> None:
    text = both(name)
    read = Reader(text)
    assert read.text.index("before") < read.text.index("after")
    tags = {tag for tag, _ in read.tags}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    for tag, attributes in read.tags:
        for key in ("src", "href"):
            value = attributes.get(key) or ""
            assert value == "" or value.startswith("#"), (tag, value)
    assert "url(" not in text
    assert "@import" not in text
    targets = {a["id"] for _, a in read.tags if "id" in a}
    links = {(a["href"] or "")[1:] for tag, a in read.tags if tag == "a"}
    assert links == targets


def test_one_program_alone() -> None:
    read = Reader(page(picture(rewritten("llama"), "mine")))
    for words in (
        "mine", "tie(blocks=2)", "4 trips", "2 blocks", "Rank of the residuals", "window 3",
        "attention to the last 3 tokens and the first 4", "state at 4,096 tokens",
        "Exits after 1, 2 trips; all are closed", "+ residual of rank 2", "rms_norm",
    ):  # fmt: skip
        assert words in read.text, words
    # blocks are numbered, not only coloured
    blocks = [a for _, a in read.tags if a.get("class") == "cell block"]
    assert len(blocks) == 4
    assert "block 0, of trips 0, 2" in (blocks[0]["title"] or "")


def test_names_of_strangers_are_text() -> None:
    program = rewritten("llama")
    step = Step(EVIL, 1.0, (EVIL,), {EVIL: {EVIL: 2.0}})
    origin = replace(
        program.origin, model=EVIL, architecture=EVIL, revision=EVIL, remarks=(EVIL,), steps=(step,)
    )
    outputs = tuple(f"{name}{EVIL}" for name in program.outputs)
    read = Reader(page(picture(replace(program, origin=origin, outputs=outputs), EVIL)))
    assert "script" not in {tag for tag, _ in read.tags}
    assert read.text.count(EVIL) >= 6


def test_a_page_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("old")
    # a name from a file system that is no UTF-8
    pages.write("new \udcff", path)
    assert path.read_text() == "new ?"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_its_window_and_loads_nothing(width: int, tmp_path: Path) -> None:
    browser.chromium()
    for name in PASSES:
        for text in (both(name), page(picture(rewritten(name), f"{name}/" + 60 * "x"))):
            seen = browser.look(text, width, tmp_path)
            assert seen["width"] == width
            assert seen["text"] > 500
            assert seen["scrolls"] <= width, (name, seen)
            assert seen["wide"] == [], name
            assert seen["loaded"] == []
            assert seen["console"] == []
