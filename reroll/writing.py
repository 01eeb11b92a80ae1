"""Writing results: refused before any work, or there whole or not at all.

Every command and function that writes asks `check_directory` or `check_file` before it begins, and
writes through `new_directory`, `filled_directory` or `new_file`, which ask again.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from reroll.errors import ExportError, UsageError

Paths = Iterable[str | Path]


def check_directory(target: str | Path, *, overwrite: bool = False, sources: Paths = ()) -> None:
    """Raise UsageError unless a directory can be written at `target`.

    An empty directory is as good as none. `sources` are what the result is made from, those of
    them that are local: the target must not replace one of them, nor lie inside a model.
    """
    target = Path(target)
    _check_place(target)
    if target.exists():
        if not target.is_dir():
            raise UsageError("this is a file, not a directory", where=str(target))
        if os.path.ismount(target):
            raise UsageError(
                "this is where a disk is mounted, which cannot be replaced as a whole",
                where=str(target),
                hint=f"name a directory in it: {target / 'out'}",
            )
        if not overwrite and any(target.iterdir()):
            raise UsageError("the directory exists and is not empty", str(target), _ANOTHER)
    _check_sources(target, sources)
    for model in _models_around(target, sources):
        raise UsageError(
            f"this is inside of the model {model}",
            where=str(target),
            hint="name a place beside it to write to",
        )
    _check_writable(target)


def check_file(target: str | Path, *, overwrite: bool = False, sources: Paths = ()) -> None:
    """Raise UsageError unless a file can be written at `target`: see `check_directory`."""
    target = Path(target)
    _check_place(target)
    if not target.absolute().parent.is_dir():
        raise UsageError("there is no such directory", where=str(target.absolute().parent))
    if target.is_dir():
        raise UsageError("this is a directory, not a file", where=str(target))
    if target.exists() and not overwrite:
        raise UsageError("the file exists", str(target), _ANOTHER)
    _check_sources(target, sources)
    _check_writable(target)


@contextmanager
def new_directory(
    target: str | Path, *, overwrite: bool = False, sources: Paths = ()
) -> Iterator[Path]:
    """A directory to write to, beside `target`; it takes the target's place when the block ends.

    Until then, and if the block raises or the process dies, the target is what it was. Raises
    UsageError as `check_directory` does, and ExportError if the disk does not take what is written.
    """
    target = Path(target)
    check_directory(target, overwrite=overwrite, sources=sources)
    with _told(target), _temporary(target.parent, target.name) as temporary:
        yield temporary
        _sync(temporary)
        _replace(temporary, target, overwrite)


@contextmanager
def filled_directory(target: str | Path, *, without: Sequence[str] = ()) -> Iterator[Path]:
    """A directory to write to; its files then replace those of the same names in `target`.

    Each is replaced at once, after all have been written; then files of the target that match the
    patterns `without` and were not written are removed. Raises as `new_directory` does.
    """
    target = Path(target)
    if not os.access(target, os.W_OK):
        raise UsageError("the directory cannot be written", str(target), _ELSEWHERE)
    with _told(target), _temporary(target, "reroll") as temporary:
        yield temporary
        _sync(temporary)
        goals = {
            path: target / path.relative_to(temporary)
            for path in sorted(p for p in temporary.rglob("*") if p.is_file())
        }
        old = {path for pattern in without for path in target.glob(pattern)}
        for path, goal in goals.items():
            goal.parent.mkdir(parents=True, exist_ok=True)
            path.replace(goal)
        for path in old - set(goals.values()):
            path.unlink()
        _sync_one(target)


@contextmanager
def new_file(target: str | Path, *, overwrite: bool = False, sources: Paths = ()) -> Iterator[Path]:
    """A path to write a file to; it takes the target's place when the block ends.

    Until then, and if the block raises or the process dies, the target is what it was. Raises
    UsageError as `check_file` does, and ExportError if the disk does not take what is written.
    """
    target = Path(target)
    check_file(target, overwrite=overwrite, sources=sources)
    with _told(target), _temporary(target.parent, target.name) as temporary:
        yield temporary / "file"
        _sync(temporary)
        (temporary / "file").replace(target)
        _sync_one(target.parent)


# ---- may it be written

_ANOTHER = "name another one, or replace it: --overwrite, in Python overwrite=True"
_ELSEWHERE = "name a place that can be written"
# as long as the names of files in what is written may be
_LONG = "x" * 64


def _check_place(target: Path) -> None:
    """Raise UsageError if the name is none that can be given to something new."""
    try:
        # what is written has longer names than the target
        with suppress(FileNotFoundError, NotADirectoryError):
            (target / _LONG).lstat()
        with suppress(FileNotFoundError):
            (target.parent / _prefix(target.name) / _LONG).lstat()
    except OSError as error:
        raise _unwritable(target, error) from error
    resolved, here = _resolved(target), _resolved(Path())
    if resolved in (here, *here.parents):
        raise UsageError(
            "this is the directory that the command runs in, or holds it",
            where=str(target),
            hint=f"name a new one: {target / 'out'}",
        )
    if target.is_symlink():
        raise UsageError(
            "this is a link",
            where=str(target),
            hint=f"name what it points to, {resolved}, or remove the link",
        )


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:
        raise _unwritable(path, error) from error


def _check_sources(target: Path, sources: Paths) -> None:
    target = target.resolve()
    for source in map(Path, sources):
        if not os.path.lexists(source):
            continue
        resolved = source.resolve()
        if target == resolved:
            raise UsageError(
                "it is read from there, and would be replaced by what is made of it",
                where=str(source),
                hint="name another place to write to",
            )
        if target in resolved.parents:
            raise UsageError(
                f"it holds {source}, which is read, and would be replaced as a whole",
                where=str(target),
                hint="name another place to write to",
            )


def _models_around(target: Path, sources: Paths) -> list[Path]:
    """The directories of models among the sources that the target lies in."""
    around = target.resolve().parents
    found = [Path(s) for s in sources if Path(s).resolve() in around]
    return [path for path in found if (path / "config.json").is_file()]


def _check_writable(target: Path) -> None:
    """Raise UsageError unless something can be made at `target`, which is tried."""
    try:
        # permissions alone do not say whether a file system can be written to
        place = next(p for p in target.absolute().parents if p.exists())
        with tempfile.TemporaryDirectory(_SUFFIX, _prefix(target.name), place):
            pass
    except OSError as error:
        raise _unwritable(target, error) from error


def _unwritable(target: Path, error: OSError | RuntimeError) -> UsageError:
    reason = getattr(error, "strerror", None) or error
    return UsageError(f"cannot write there: {reason}", str(target), _ELSEWHERE)


# ---- whole or not at all

_SUFFIX = ".reroll-tmp"


@contextmanager
def _told(target: Path) -> Iterator[None]:
    """Say of which target it is that a disk does not take what is written."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise ExportError(
            f"cannot be written: {error.strerror or error}",
            where=str(target),
            hint=f"make room, or {_ELSEWHERE}" if full else _ELSEWHERE,
        ) from error


@contextmanager
def _temporary(place: Path, name: str) -> Iterator[Path]:
    """A new directory in `place`, gone when the block ends, or when the next one is made."""
    place.mkdir(parents=True, exist_ok=True)
    _remove_dead(place, name)
    temporary = Path(tempfile.mkdtemp(prefix=_prefix(name), suffix=_SUFFIX, dir=place))
    try:
        temporary.chmod(0o777 & ~_umask())
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _prefix(name: str) -> str:
    """What the names of temporary directories for a target begin with; its number is ours."""
    return f"{_stem(name)}{os.getpid()}."


def _stem(name: str) -> str:
    # a name that is as long as may be leaves no room for more
    return f".{os.fsdecode(os.fsencode(name)[:128])}."


def _remove_dead(place: Path, name: str) -> None:
    """Remove what processes that are no longer there were writing for the same target.

    An old directory that was to be replaced, and has not been, gets its place back.
    """
    pattern = re.compile(rf"{re.escape(_stem(name))}(\d+)\..*{re.escape(_SUFFIX)}")
    for path in place.iterdir():
        found = pattern.fullmatch(path.name)
        if found is None or _is_alive(int(found[1])):
            continue
        if path.name.endswith(_OLD) and not os.path.lexists(place / name):
            path.rename(place / name)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


_OLD = f".old{_SUFFIX}"


def _replace(temporary: Path, target: Path, overwrite: bool) -> None:
    if not overwrite or not target.exists():
        # an empty directory is replaced; one that somebody has filled meanwhile is not
        temporary.rename(target)
    elif not _exchange(temporary, target):
        old = temporary.with_name(temporary.name.removesuffix(_SUFFIX) + _OLD)
        target.rename(old)
        try:
            temporary.rename(target)
        except OSError:
            old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    _sync_one(target.parent)


def _exchange(a: Path, b: Path) -> bool:
    """Give each of two directories the other's name at once, if the system can do that."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0)


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
