"""Text sets: where each comes from, and how it becomes a training and a held-out file."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tools import corpora
from tools.atomic import staged
from tools.corpora import Document
from tools.errors import PrepareError
from tools.packages import DebianPackage, PythonPackage

SPLITS = ("train", "val")


@dataclass(frozen=True)
class TextSet:
    """A set of documents, by the package that they come in."""

    package: PythonPackage | DebianPackage
    documents: Callable[[Path], Iterator[Document]]
    licence: str


GENSIM = PythonPackage(
    "gensim",
    "4.4.0",
    "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
    # any file of the release has the same text; one of them has the hash
    pick=(
        "--only-binary=:all:",
        "--implementation=cp",
        "--python-version=3.11",
        "--abi=cp311",
        "--platform=manylinux_2_28_x86_64",
    ),
)
SHAKESPEARE = PythonPackage(
    "shakespeare", "0.6", "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
)

SETS = {
    "wiki": TextSet(GENSIM, corpora.wiki, "CC-BY-SA-3.0"),
    "shakespeare": TextSet(SHAKESPEARE, corpora.shakespeare, "public domain"),
    "pydocs": TextSet(DebianPackage("python3.11-doc"), corpora.pydocs, "PSF-2.0"),
    "pycode": TextSet(DebianPackage("libpython3.11-stdlib"), corpora.pycode, "PSF-2.0"),
    "pgdocs": TextSet(DebianPackage("postgresql-doc-15"), corpora.pgdocs, "PostgreSQL"),
    "sqlitedocs": TextSet(DebianPackage("sqlite3-doc"), corpora.sqlitedocs, "public domain"),
    "foldoc": TextSet(DebianPackage("dict-foldoc"), corpora.foldoc, "GFDL-1.1-or-later"),
    "gcide": TextSet(DebianPackage("dict-gcide"), corpora.gcide, "GPL-3.0-or-later"),
}


def split(documents: Iterable[Document]) -> dict[str, str]:
    """The text of each split: its documents with a blank line between them."""
    parts: dict[str, list[str]] = {name: [] for name in SPLITS}
    for document in documents:
        parts["val" if document.held_out else "train"].append(document.text)
    for name, texts in parts.items():
        if not texts:
            raise PrepareError(
                f"no document for the {name} split",
                "the package's layout has changed: adapt the reader in tools/corpora.py",
            )
    return {name: "\n\n".join(texts) for name, texts in parts.items()}


def build(name: str, folder: Path, work: Path) -> None:
    """Write `<name>.train.txt` and `<name>.val.txt` in `folder`, unpacking below `work`."""
    text_set = SETS[name]
    text_set.package.fetch(work / name)
    texts = split(text_set.documents(work / name))
    train, validation = (folder / f"{name}.{part}.txt" for part in SPLITS)
    with staged(train) as new_train, staged(validation) as new_validation:
        new_train.write_bytes(texts["train"].encode())
        new_validation.write_bytes(texts["val"].encode())
