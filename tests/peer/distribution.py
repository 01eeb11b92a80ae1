"""The test modules of transformers' source distribution, with stand-ins for what it lacks."""

from __future__ import annotations

import os
import sys
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

from tools.peer_tests import FOLDER, location

COMMAND = "python -m tools.peer_tests"
PACKAGE = "transformers_tests"

# classes that the common tests inherit from or ask for, of modules that are not distributed
STAND_INS = {
    "exporters.test_export": "ExportTesterMixin",
    "generation.test_utils": "GenerationTesterMixin",
}


def fetched() -> bool:
    """Whether the tests have been fetched."""
    return location().is_dir() and (FOLDER / "parameterized").is_dir()


@cache
def test_module(name: str) -> Any:
    """One of transformers' test modules, such as `test_modeling_common`."""
    if PACKAGE not in sys.modules:
        # a test that starts a process of pytest for itself runs in this one
        os.environ["_INSIDE_SUB_PROCESS"] = "1"
        sys.path.append(str(FOLDER))
        _add(PACKAGE).__path__ = [str(location())]
        for module, class_name in STAND_INS.items():
            _add(f"{PACKAGE}.{module.partition('.')[0]}").__path__ = []
            setattr(_add(f"{PACKAGE}.{module}"), class_name, type(class_name, (), {}))
    return import_module(f"{PACKAGE}.{name}")


def _add(name: str) -> Any:
    return sys.modules.setdefault(name, ModuleType(name))
