"""The mixers' suite, run over every mixer that is registered."""

from __future__ import annotations

from typing import Any

from reroll.mixers import make, registered
from tests.conformance.mixer_suite import MixerSuite

# options that change a mixer's mathematics
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("linear", {"feature_map": "relu"}),
    ("linear", {"feature_map": "softmax"}),
    ("linear", {"feature_map": "hedgehog"}),
    ("linear", {"feature_map": "taylor"}),
    ("linear", {"normalise": False}),
    ("retention", {"feature_map": "taylor"}),
    ("mamba2", {"feature_map": "elu"}),
    ("gla", {"feature_map": "softmax", "scale": 1.0}),
    ("rwkv6", {"feature_map": "hedgehog"}),
    ("hgrn2", {"feature_map": "softmax"}),
    ("hgrn2", {"lower_bound": 0.3}),
    ("gsa", {"slots": 7}),
    ("deltanet", {"negative": True}),
    ("gated_deltanet", {"negative": True}),
    ("kda", {"negative": True}),
    ("deltaproduct", {"steps": 3, "negative": False}),
)

SMALL = {"chunk_size": 8}


def _add_suite(name: str, options: dict[str, Any]) -> None:
    title = "_".join(map(str, (f"Test_{name}", *options.values())))
    mixer = make(name, SMALL | options)
    globals()[title] = type(title, (MixerSuite,), {"mixer": mixer, "__test__": True})


MixerSuite.__test__ = False
for _name in registered():
    _add_suite(_name, {})
for _name, _options in VARIANTS:
    _add_suite(_name, _options)
