"""Outputs that are whole or absent."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staged(destination: Path) -> Iterator[Path]:
    """Yield a path to write a file or folder at, and rename it to `destination` on success.

    The path lies in a fresh folder beside the destination, so that the rename stays on one file
    system. If the block raises, the folder goes and the destination is as it was. A folder that
    another run has put there in the meantime is kept.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    holder = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
    try:
        path = holder / destination.name
        yield path
        if not (path.is_dir() and destination.is_dir()):
            path.replace(destination)
    finally:
        shutil.rmtree(holder, ignore_errors=True)
