"""Where passes are found: the folder `reroll/passes`, entry points, and files that a user names.

Every module of the folder is imported on the first look-up, so a new pass is one new file. Other
distributions add theirs with an entry point of the group `reroll.passes`, whose value is a module
or a `Pass` class.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from functools import cache
from pathlib import Path

from reroll.errors import UsageError, located
from reroll.rewrite.pipeline.base import Pass
from reroll.rewrite.pipeline.discovery import add_entry_points, classes_in, classes_of, look_up
from reroll.rewrite.pipeline.options import check_options

# by name, so that this package imports nothing of the one above it
FOLDER = "reroll.passes"
GROUP = "reroll.passes"

_passes: dict[str, type[Pass]] = {}
_failures: list[str] = []


def registered() -> dict[str, type[Pass]]:
    """All known passes by name, sorted."""
    _discover()
    return dict(sorted(_passes.items()))


def find(name: str) -> type[Pass]:
    """The pass of this name; UsageError with the nearest spelling if there is none."""
    _discover()
    return look_up(_passes, name, "pass", "pipeline", "\n  ".join(_failures))


def register(cls: type[Pass]) -> type[Pass]:
    """Add one pass; UsageError if another one has its name. Usable as a class decorator."""
    _discover()
    return _add(cls)


def load_file(path: str | Path) -> tuple[type[Pass], ...]:
    """Run a Python file of the user's and register the passes that it defines.

    This executes the file, so it only ever happens because a person named it. Raises UsageError if
    the file is missing, fails, or defines no pass.
    """
    file = Path(path).resolve()
    if not file.is_file():
        raise UsageError("there is no such file", where=str(path))
    # two files of one name are two modules
    name = f"reroll_loaded_{file.stem}_{hashlib.blake2b(bytes(file), digest_size=4).hexdigest()}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UsageError("this is not a Python file", where=str(path))
    module = importlib.util.module_from_spec(spec)
    # dataclasses look annotations up in the module
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UsageError(f"{type(error).__name__}: {error}", where=str(path)) from error
    found = classes_of(module, Pass)  # type: ignore[type-abstract]
    if not found:
        raise UsageError(
            "the file defines no pass",
            where=str(path),
            hint="a pass is a subclass of reroll.rewrite.pipeline.base.Pass that sets `name`",
        )
    with located(str(path)):
        return tuple(register(cls) for cls in found)


@cache
def _discover() -> None:
    for cls in classes_in(FOLDER, Pass):  # type: ignore[type-abstract]
        _add(cls)
    _failures.extend(add_entry_points(GROUP, Pass, _add))  # type: ignore[type-abstract]


def _add(cls: type[Pass]) -> type[Pass]:
    known = _passes.get(cls.name)
    check_options(cls)
    if not cls.name.isidentifier():
        raise UsageError(f"{cls.name!r} is not a name for a pass", where=cls.__qualname__)
    # loading a file again replaces its passes
    if known is not None and _origin(known) != _origin(cls):
        raise UsageError(
            f"there are two passes called {cls.name!r}",
            where=f"{_origin(known)} and {_origin(cls)}",
            hint="rename one of them",
        )
    _passes[cls.name] = cls
    return cls


def _origin(cls: type[Pass]) -> str:
    module = sys.modules.get(cls.__module__)
    return str(getattr(module, "__file__", cls.__module__))
