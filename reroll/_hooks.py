"""Run something when a module is imported, so that `import reroll` itself imports nothing large."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

Hook = Callable[[ModuleType], None]


def after_import(name: str, hook: Hook) -> None:
    """Call `hook` with a module right after it is imported, or now if it has been."""
    module = sys.modules.get(name)
    if module is None:
        sys.meta_path.insert(0, _Finder(name, hook))
    else:
        hook(module)


class _Finder(MetaPathFinder):
    """Finds one module by asking the other finders, once."""

    def __init__(self, name: str, hook: Hook) -> None:
        self.name = name
        self.hook = hook

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if fullname != self.name or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.hook)
        return spec


class _Loader(Loader):
    """The module's own loader, and the hook after it."""

    def __init__(self, inner: Loader, hook: Hook) -> None:
        self.inner = inner
        self.hook = hook

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # whoever asks the module for its source or its files asks its own loader
        module.__loader__ = self.inner
        if module.__spec__ is not None:
            module.__spec__.loader = self.inner
        self.inner.exec_module(module)
        self.hook(module)
