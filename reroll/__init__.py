"""reroll: a compiler that rolls a pretrained transformer back into the loops that it is.

    import reroll

    program = reroll.capture("path-or-hub-id-or-model")
    program = reroll.run_passes(program, "tie(blocks=10), relax(rank=64)")
    program.save("out/")

Importing this package imports neither torch nor transformers. It arranges that transformers' auto
classes load what `Program.save` wrote, whenever transformers is imported.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from reroll import _registration

if TYPE_CHECKING:
    from reroll._api import load, parse, run_passes
    from reroll.evaluate.classifiers import fit_exits
    from reroll.evaluate.exits import calibrate
    from reroll.evaluate.speculating import generate, twin
    from reroll.rewrite.capture import capture
    from reroll.rewrite.ir.program import Program
    from reroll.rewrite.pipeline import Pass
    from reroll.runtime.depthwise import DepthScheduler
    from reroll.runtime.functions.trips import sample_trips
    from reroll.runtime.state.prefixes import PrefixCache

__version__ = "0.1.0"
__all__ = [
    "DepthScheduler",
    "Pass",
    "PrefixCache",
    "Program",
    "__version__",
    "calibrate",
    "capture",
    "fit_exits",
    "generate",
    "load",
    "parse",
    "run_passes",
    "sample_trips",
    "twin",
]

_HOMES = {
    "DepthScheduler": "reroll.runtime.depthwise",
    "calibrate": "reroll.evaluate.exits",
    "fit_exits": "reroll.evaluate.classifiers",
    "Pass": "reroll.rewrite.pipeline",
    "PrefixCache": "reroll.runtime.state.prefixes",
    "Program": "reroll.rewrite.ir.program",
    "capture": "reroll.rewrite.capture",
    "generate": "reroll.evaluate.speculating",
    "load": "reroll._api",
    "parse": "reroll._api",
    "run_passes": "reroll._api",
    "sample_trips": "reroll.runtime.functions.trips",
    "twin": "reroll.evaluate.speculating",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_registration.register()
