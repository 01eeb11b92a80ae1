"""Registries of passes, mixers, targets, stages and measures.

Each kind is declared as classes in a folder, one class per file. Every module of the folder is
imported on the first look-up. Other distributions add theirs by an entry point, whose value is a
module or a class. A file that a user names may define any of them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import logging
import pkgutil
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Generic, TypeVar

from reroll.errors import UsageError, located
from reroll.rewrite.ir.lowerings import from_file
from reroll.rewrite.pipeline.declared import Declared
from reroll.rewrite.pipeline.options import check_options, nearest_name

T = TypeVar("T", bound=Declared)

log = logging.getLogger(__name__)

# modules with one registry each, as names, so that the packages above are not imported
MODULES = (
    "reroll.rewrite.pipeline.base",
    "reroll.mixers.registry",
    "reroll.export.targets",
    "reroll.recover.stage",
    "reroll.evaluate.measure",
)


class Registry(Generic[T]):
    """Registry of the classes of one kind, by name.

    `folder` is the package with the built-in classes, `group` the group of entry points. `added` is
    called with each class that is added.
    """

    known: ClassVar[list[Registry[Any]]] = []

    def __init__(
        self,
        base: type[T],
        folder: str,
        group: str,
        where: str | None = None,
        added: Callable[[type[T]], None] = lambda cls: None,
    ) -> None:
        self.base, self.folder, self.group, self.added = base, folder, group, added
        self.category, self.where = base.category, where
        self.classes: dict[str, type[T]] = {}
        # the distribution of each class from an entry point, and messages of those that failed
        self.distributions: dict[str, str] = {}
        self.failures: list[str] = []
        self._discovered = False
        Registry.known.append(self)

    def all(self) -> dict[str, type[T]]:
        """Return all known classes by name, sorted."""
        self._discover()
        return dict(sorted(self.classes.items()))

    def find(self, name: str) -> type[T]:
        """Find the class of this name; UsageError with the nearest name if there is none."""
        known = self.all()
        if name not in known:
            near = nearest_name(name, list(known)) or ""
            loading = f"--load FILE finds a {self.category} of your own, and so does an entry point"
            hints = [near, *self.failures, *([] if near.startswith("did") else [loading])]
            hints = [hint for hint in hints if hint]
            message = f"there is no {self.category} {name!r}"
            raise UsageError(message, self.where, "\n  ".join(hints) or None)
        return known[name]

    def add(self, cls: type[T]) -> type[T]:
        """Add a class; UsageError if another one has its name. Usable as a decorator."""
        self._discover()
        return self._add(cls)

    def classes_of(self, module: ModuleType) -> list[type[T]]:
        """Return the concrete subclasses with a `name` that a module or its submodules define."""
        return [
            value
            for value in vars(module).values()
            if inspect.isclass(value)
            and issubclass(value, self.base)
            and f"{value.__module__}.".startswith(f"{module.__name__}.")
            and getattr(value, "name", None)
            and not inspect.isabstract(value)
        ]

    def origin(self, name: str) -> str:
        """Return the origin of a class: "reroll", a distribution, or a file."""
        cls = self.find(name)
        if cls.__module__.startswith(f"{self.folder}."):
            return "reroll"
        return self.distributions.get(name) or _file(cls)

    def _discover(self) -> None:
        if self._discovered:
            return
        self._discovered = True
        package = importlib.import_module(self.folder)
        for info in pkgutil.iter_modules(package.__path__, f"{self.folder}."):
            for cls in self.classes_of(importlib.import_module(info.name)):
                self._add(cls)
        for point in entry_points(group=self.group):
            # a broken package of others must not break reroll, but is reported
            try:
                for cls in self._loaded(point):
                    self._add(cls)
                    self.distributions[cls.name] = getattr(point.dist, "name", point.value)
            except Exception as error:
                failure = f"entry point {point.name} ({point.value}) failed: {error}"
                log.warning("%s", failure)
                self.failures.append(failure)

    def _loaded(self, point: EntryPoint) -> list[type[T]]:
        loaded = point.load()
        return self.classes_of(loaded) if isinstance(loaded, ModuleType) else [loaded]

    def _add(self, cls: type[T]) -> type[T]:
        check_options(cls)
        if not cls.name.isidentifier():
            raise UsageError(f"{cls.name!r} is not a name for a {self.category}", cls.__qualname__)
        other = self.classes.get(cls.name)
        # loading a file again replaces its classes
        if other is not None and _file(other) != _file(cls):
            raise UsageError(
                f"there are two {self.category}{'es' if self.category.endswith('s') else 's'} "
                f"called {cls.name!r}",
                where=f"{_file(other)} and {_file(cls)}",
                hint="rename one of them",
            )
        self.classes[cls.name] = cls
        self.added(cls)
        return cls


def registries() -> Iterator[Registry[Any]]:
    """Yield the registries of all kinds."""
    for module in MODULES:
        importlib.import_module(module)
    yield from Registry.known


def load_file(path: str | Path) -> tuple[type[Declared], ...]:
    """Run a user's Python file and register the passes, mixers, targets, ... that it defines.

    A file may also only give lowerings of ops. Returns the classes that it defines. This executes
    the file, so it happens only for files that a user names. Raises UsageError if the file is
    missing, fails, or defines nothing of the kind.
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
    # dataclasses look annotations up in `sys.modules`
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UsageError(f"{type(error).__name__}: {error}", where=str(path)) from error
    # the file has imported the base classes, so their registries exist
    plugins = [(r, cls) for r in Registry.known for cls in r.classes_of(module)]
    if not plugins and not from_file(str(file)):
        raise UsageError(
            "the file defines no pass, mixer, target, stage or measure, and no lowering of an op",
            where=str(path),
            hint="a pass is a subclass of reroll.Pass that sets `name`",
        )
    with located(str(path)):
        return tuple(registry.add(cls) for registry, cls in plugins)


def _file(cls: type[Any]) -> str:
    module = sys.modules.get(cls.__module__)
    return str(getattr(module, "__file__", cls.__module__))
