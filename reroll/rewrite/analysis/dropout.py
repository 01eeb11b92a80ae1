"""Dropout of the original, which a captured graph does not have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def dropout_of(config: Mapping[str, Any]) -> dict[str, float]:
    """Return the rates in (0, 1] by which a configuration lets a model drop out in training.

    They are its entries with `drop` in their names: of hidden states, attention weights, layers.
    Those of a nested configuration have its name before theirs, such as `text_config.dropout`.
    """
    found: dict[str, float] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            found.update({f"{name}.{inner}": rate for inner, rate in dropout_of(value).items()})
        elif "drop" in str(name) and _is_rate(value):
            found[name] = float(value)
    return found


def _is_rate(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1


def dropout_remark(config: Mapping[str, Any]) -> str | None:
    """Return what to tell who trains a model of this configuration; None if nothing drops out."""
    rates = dropout_of(config)
    if not rates:
        return None
    listed = ", ".join(f"{name}={rate:g}" for name, rate in rates.items())
    return (
        f"in training the original drops out ({listed}), and this model does not: what is captured "
        "is the function that evaluates"
    )
