"""Registry of the rules of `recurrence`: a token mixer's computation and costs.

The mixers are in a package that imports this one, and register themselves with `register_rule`. The
first look-up of an unknown name imports that package by name. So a Program that was read from a
file runs, prints its costs and verifies without an explicit import of a mixer.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from reroll.errors import UsageError

# a name, so that there is no import cycle with the mixers
PACKAGE = "reroll.mixers"


class Rule(Protocol):
    """Rule of one mixer; `options` is the JSON text of the op."""

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Sequence[Tensor],
        options: str,
        padding: Tensor | None,
    ) -> Tensor:
        """Return [batch, time, heads, d_v] from a zero state, differentiable."""

    def flops(self, options: str, heads: int, kv_heads: int, d_k: int, d_v: int) -> int:
        """Count the operations for one more token."""

    def state_bytes(self, options: str, kv_heads: int, d_k: int, d_v: int) -> int:
        """Count the bytes of state of one sequence, which do not depend on its length."""


_rules: dict[str, Rule] = {}


def register_rule(name: str, rule: Rule) -> None:
    """Register `rule` as the computation of `recurrence(..., rule=name)`."""
    _rules[name] = rule


def find_rule(name: str) -> Rule:
    """Return the rule of this name; UsageError with the known names if there is none."""
    if name not in _rules:
        importlib.import_module(PACKAGE).discover()
    if name not in _rules:
        raise UsageError(
            f"there is no mixer {name!r}",
            where="recurrence",
            hint=f"known: {', '.join(sorted(_rules))}",
        )
    return _rules[name]
