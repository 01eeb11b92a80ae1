"""Write results whole or not at all, and refuse bad targets before any work.

Every command and function that writes calls `check_directory` or `check_file` before it begins. It
writes through `new_directory`, `filled_directory` or `new_file`, which check again.
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from reroll.errors import ExportError, UsageError

Paths = Iterable[str | Path]


def check_directory(target: str | Path, *, overwrite: bool = False, sources: Paths = ()) -> None:
    """Raise UsageError unless a directory can be written at `target`.

    An empty directory may be replaced. `sources` are what the result is made from; those that are
    not local are ignored. The target must not replace a source, nor lie inside a model.
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
            f"this is inside the model {model}",
            where=str(target),
            hint="name a directory outside of the model",
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


def file_sizes(directory: Path) -> dict[str, int]:
    """Return the bytes of each file in a directory, by its path within."""
    files = sorted(f for f in directory.rglob("*") if f.is_file())
    return {str(f.relative_to(directory)): f.stat().st_size for f in files}


@contextmanager
def new_directory(
    target: str | Path, *, overwrite: bool = False, sources: Paths = ()
) -> Iterator[Path]:
    """Yield a temporary directory next to `target`, which replaces the target when the block ends.

    Until then, and if the block raises or the process dies, the target is unchanged. Raises
    UsageError as `check_directory` does, and ExportError if writing fails.
    """
    target = Path(target)
    check_directory(target, overwrite=overwrite, sources=sources)
    with _told(target), _temporary(target.parent, target.name) as temporary:
        yield temporary
        _sync(temporary)
        _replace(temporary, target, overwrite)


@contextmanager
def filled_directory(target: str | Path, *, without: Sequence[str] = ()) -> Iterator[Path]:
    """Yield a temporary directory whose files replace those of the same names in `target`.

    They are replaced one by one after all have been written. Then files of the target that match
    the patterns `without` and were not written are removed. Raises UsageError if the target cannot
    be written, and ExportError if writing fails.
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
    """Yield a temporary path for a file, which replaces `target` when the block ends.

    Until then, and if the block raises or the process dies, the target is unchanged. Raises
    UsageError as `check_file` does, and ExportError if writing fails.
    """
    target = Path(target)
    check_file(target, overwrite=overwrite, sources=sources)
    with _told(target), _temporary(target.parent, target.name) as temporary:
        yield temporary / "file"
        _sync(temporary)
        (temporary / "file").replace(target)
        _sync_one(target.parent)


# ---- checks of the target

_ANOTHER = "name another one, or replace it: --overwrite, in Python overwrite=True"
_ELSEWHERE = "name a place that can be written"
# stands for the longest file name in a result
_LONG = "x" * 64


def _check_place(target: Path) -> None:
    """Raise UsageError if nothing new can have this name."""
    try:
        # files in the result have longer paths than the target
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
                f"this directory holds {source}, which is an input, and would be replaced",
                where=str(target),
                hint="name another place to write to",
            )


def _models_around(target: Path, sources: Paths) -> list[Path]:
    """Return the model directories among the sources that contain the target."""
    around = target.resolve().parents
    found = [Path(s) for s in sources if Path(s).resolve() in around]
    return [path for path in found if (path / "config.json").is_file()]


def _check_writable(target: Path) -> None:
    """Raise UsageError unless a temporary directory can be created for `target`."""
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


# ---- atomic replacement

_SUFFIX = ".reroll-tmp"


@contextmanager
def _told(target: Path) -> Iterator[None]:
    """Convert an OSError while writing to an ExportError that names the target."""
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
    """Yield a new directory in `place`, removed when the block ends, or by the next run."""
    place.mkdir(parents=True, exist_ok=True)
    _remove_dead(place, name)
    temporary = Path(tempfile.mkdtemp(prefix=_prefix(name), suffix=_SUFFIX, dir=place))
    try:
        temporary.chmod(0o777 & ~_umask())
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _prefix(name: str) -> str:
    """Return the prefix of temporary directories for a target; it holds this process's id."""
    return f"{_stem(name)}{os.getpid()}."


def _stem(name: str) -> str:
    # shortened, because a name of the longest length leaves no room for a suffix
    return f".{os.fsdecode(os.fsencode(name)[:128])}."


def _remove_dead(place: Path, name: str) -> None:
    """Remove the temporary directories of processes that have ended, for the same target.

    An old directory that was moved away, and whose replacement did not happen, is moved back.
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
        # `rename` replaces an empty directory, and fails if it has been filled meanwhile
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
    """Swap two directories atomically; return False if the system cannot do that."""
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
    """Flush everything below a directory to the disk before it gets its name."""
    for path in [*directory.rglob("*"), directory]:
        _sync_one(path)


def _sync_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- files that exist until the process ends

_TEMPORARY: set[Path] = set()


def temporary_folder(name: str) -> Path:
    """Create a folder that is removed when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix=f"reroll-{name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    _TEMPORARY.add(folder)
    return folder


def is_temporary(file: str | Path) -> bool:
    """Whether a file is in a folder that this process removes when it ends."""
    return not _TEMPORARY.isdisjoint(Path(file).parents)


@cache
def temporary_files(*contents: tuple[str, bytes]) -> Path:
    """Write files, each a name and its content, to a folder that is removed when the process ends.

    The same files are in the same folder.
    """
    folder = temporary_folder("files")
    for name, content in contents:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder
