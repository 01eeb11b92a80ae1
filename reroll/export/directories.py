"""Writing a directory so that it is there whole or not at all, whatever interrupts the writing."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reroll.errors import UsageError


@contextmanager
def new_directory(target: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A directory to write to, beside `target`; it takes the target's place when the block ends.

    Until then, and if the block raises or the process dies, the target is what it was. Raises
    UsageError if the target exists and is not to be overwritten, or cannot be written.
    """
    target = Path(target)
    _check(target, overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_dead(target)
        prefix = f".{target.name}.{os.getpid()}."
        temporary = Path(tempfile.mkdtemp(prefix=prefix, suffix=_SUFFIX, dir=target.parent))
    except OSError as error:
        raise UsageError(f"cannot write there: {error.strerror}", where=str(target)) from error
    try:
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        _sync(temporary)
        _replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


_SUFFIX = ".reroll-tmp"


def _check(target: Path, overwrite: bool) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UsageError("there is something that is not a directory", where=str(target))
    if target.exists() and not overwrite and any(target.iterdir()):
        raise UsageError(
            "the directory exists and is not empty",
            where=str(target),
            hint="choose another one, or ask to overwrite it",
        )


def _replace(temporary: Path, target: Path) -> None:
    old = None
    if target.exists():
        old = temporary.with_name(temporary.name.replace(_SUFFIX, f".old{_SUFFIX}"))
        target.rename(old)
    try:
        temporary.rename(target)
    except OSError:
        if old is not None:
            old.rename(target)
        raise
    _sync_one(target.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _remove_dead(target: Path) -> None:
    """Remove what processes that are no longer there were writing for the same target."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.(\d+)\..*{re.escape(_SUFFIX)}")
    for path in target.parent.iterdir():
        found = pattern.fullmatch(path.name)
        if found is not None and not _is_alive(int(found[1])):
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(directory: Path) -> None:
    """Have everything below a directory on the disk before it gets its name."""
    for path in [*directory.rglob("*"), directory]:
        _sync_one(path)


def _sync_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
