"""The mixers' suite, run over every mixer that is registered."""

from __future__ import annotations

from typing import Any

from reroll.mixers import make, registered
from tests.conformance.mixer_suite import MixerSuite

# beside each mixer as it comes: options that change its mathematics
VARIANTS: dict[str, dict[str, Any]] = {}

SMALL = {"chunk_size": 8}


def _suite(name: str, options: dict[str, Any]) -> type[MixerSuite]:
    title = "".join(w.title() for w in (name, *options))
    return type(f"Test{title}", (MixerSuite,), {"mixer": make(name, SMALL | options)})


for _name in registered():
    _cls = _suite(_name, {})
    globals()[_cls.__name__] = _cls
for _label, _options in VARIANTS.items():
    _cls = _suite(_label.split(":")[0], _options)
    globals()[_cls.__name__ + str(len(globals()))] = _cls
