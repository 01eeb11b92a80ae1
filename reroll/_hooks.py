"""Call functions when a module is imported, so that `import reroll` imports nothing large."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

Hook = Callable[[ModuleType], None]


def after_import(name: str, hook: Hook) -> None:
    """Call `hook` with a module right after its import, or now if it is imported already."""
    module = sys.modules.get(name)
    if module is None:
        sys.meta_path.insert(0, _Finder(name, hook))
    else:
        hook(module)


class _Finder(MetaPathFinder):
    """Finder of one module that asks the other finders, once."""

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
    """Loader that runs the module's own loader, then the hook."""

    def __init__(self, inner: Loader, hook: Hook) -> None:
        self.inner = inner
        self.hook = hook

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # queries for the module's source or files must reach its own loader
        module.__loader__ = self.inner
        if module.__spec__ is not None:
            module.__spec__.loader = self.inner
        self.inner.exec_module(module)
        self.hook(module)
