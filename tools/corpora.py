"""The documents of each text set, read from an unpacked package.

A reader takes the package's folder and yields documents. Whole documents are held out, chosen by
a hash of their name or by hand, so that the split is the same on every machine.
"""

import bz2
import gzip
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tools.markup import html_to_text, tidy
from tools.packages import find
from tools.wikitext import articles


@dataclass(frozen=True)
class Document:
    """One document and whether it is held out from training."""

    text: str
    held_out: bool


def held_out(name: str, one_in: int, pick: int = 0) -> bool:
    """Whether a document is among the share of about 1/`one_in` that is held out."""
    return int(hashlib.md5(name.encode()).hexdigest(), 16) % one_in == pick


def files(folder: Path, *patterns: str) -> list[tuple[str, Path]]:
    """The files under a folder that match any pattern, by their names relative to it, in order."""
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return [(str(path.relative_to(folder)), path) for path in sorted(found, key=str)]


def read(path: Path) -> str:
    """A file's text, whose encoding is UTF-8 or else Latin-1."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def wiki(package: Path) -> Iterator[Document]:
    """Wikipedia articles of some length, from the excerpt of a dump that gensim tests with."""
    dump = find(package, "**/test_data/enwiki-latest-pages-articles1.xml*shortened.bz2")
    for title, text in articles(bz2.decompress(dump.read_bytes()).decode()):
        if len(text) >= 1500:
            yield Document(text, held_out(title, one_in=7, pick=3))


def shakespeare(package: Path) -> Iterator[Document]:
    """Plays and poems of Shakespeare and Milton."""
    left_out = {"poemata_gut.txt", "poetical_works_gut.txt"}  # Latin; duplicates
    validation = {"hamlet_gut.txt", "twelfth_night_gut.txt", "paradise_regained_gut.txt"}
    for _, path in files(package, "*/shksprdata/texts/*_gut.txt", "*/miltondata/texts/*_gut.txt"):
        if path.name not in left_out:
            yield Document(tidy(without_gutenberg_notes(read(path))), path.name in validation)


def without_gutenberg_notes(text: str) -> str:
    """An etext without Project Gutenberg's words before and after it."""
    text = re.split(r"\*\*\* ?START OF.*\n", text)[-1]
    return re.split(r"\n.*(?:\*\*\* ?END OF|End of (?:the )?Project Gutenberg).*", text)[0]


def pydocs(package: Path) -> Iterator[Document]:
    """The sources of the Python documentation, in reStructuredText."""
    folder = package / "usr/share/doc/python3.11/html/_sources"
    for name, path in files(folder, "**/*.rst.txt"):
        text = read(path)
        if len(text) >= 1500 and "whatsnew/changelog" not in name:
            yield Document(tidy(text), held_out(name, one_in=12))


def pycode(package: Path) -> Iterator[Document]:
    """The Python standard library."""
    left_out = r"(pydoc_data|/_sysconfigdata|encodings/|idlelib/|test/|tests/|lib2to3/pgen2)"
    folder = package / "usr/lib/python3.11"
    for name, path in files(folder, "**/*.py"):
        text = read(path)
        if len(text) >= 1000 and not re.search(left_out, name):
            text = text.replace("\r\n", "\n").rstrip() + "\n"
            yield Document(text, held_out(name, one_in=12))


def pgdocs(package: Path) -> Iterator[Document]:
    """The PostgreSQL manual, without its lists and release notes."""
    left_out = r"(release|bookindex|index|biblio|features|sql-keywords|errcodes)"
    navigation = frozenset({"navheader", "navfooter", "toc"})
    folder = package / "usr/share/doc/postgresql-doc-15/html"
    for name, path in files(folder, "*.html"):
        if re.match(left_out, name):
            continue
        text = html_to_text(read(path), unread_classes=navigation)
        if len(text) >= 1500:
            yield Document(text, held_out(name, one_in=12))


def sqlitedocs(package: Path) -> Iterator[Document]:
    """The SQLite manual, without its lists and generated pages; some pages exist twice."""
    left_out = (
        r"(keyword_index|doclist|sitemap|syntaxdiagrams|lang_select|chronology|toc|releaselog"
        r"|changes|funclist|objlist|constlist|errorlog|requirements|hlr|fileio)"
    )
    navigation = frozenset({"menu", "nosearch", "fancy_toc", "searchmenu", "tagline", "mobileonly"})
    seen: set[str] = set()
    folder = package / "usr/share/doc/sqlite3"
    for name, path in files(folder, "*.html", "c3ref/*.html"):
        if re.search(left_out, name):
            continue
        text = html_to_text(read(path), unread_classes=navigation)
        if len(text) >= 2000 and text not in seen:
            seen.add(text)
            yield Document(text, held_out(name, one_in=12))


def foldoc(package: Path) -> Iterator[Document]:
    """The Free On-line Dictionary of Computing, 50 entries to a document."""
    text = dictionary(package / "usr/share/dictd/foldoc.dict.dz")
    for index, entries in enumerate(entry_groups(text, first=30, size=50)):
        yield Document(tidy(entries), index % 15 == 3)


def gcide(package: Path) -> Iterator[Document]:
    """The Collaborative International Dictionary of English, 200 entries to a document."""
    text = dictionary(package / "usr/share/dictd/gcide.dict.dz")
    sources = r"1913 Webster|PJC|WordNet[^\]]*|Webster 1913[^\]]*|1913 Webster \+PJC"
    text = re.sub(rf"\n\s*\[(?:{sources})\]", "", text)
    for index, entries in enumerate(entry_groups(text, first=200, size=200), start=1):
        yield Document(tidy(entries), index % 40 == 7)


def dictionary(path: Path) -> str:
    """The text of a dictd dictionary, whose format is gzip's."""
    return gzip.decompress(path.read_bytes()).decode("utf-8", "replace")


def entry_groups(text: str, *, first: int, size: int) -> Iterator[str]:
    """A dictionary's entries from the `first` on (its preface counts as some), `size` at a time.

    An entry begins in the first column.
    """
    entries = re.split(r"\n(?=\S)", text)
    for start in range(first, len(entries), size):
        yield "\n".join(entries[start : start + size])
