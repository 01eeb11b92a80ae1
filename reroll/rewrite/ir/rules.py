"""The rules of `recurrence`: what a token mixer tells the engine about itself.

The mixers live in a package above this one and add themselves with `register_rule`. On the first
look-up of a name that is not there yet, the package is imported by name, so that a Program that was
read from a file runs, prints its costs and verifies without anybody having imported a mixer.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from reroll.errors import UsageError

# by name, so that this package imports nothing of the one above it
PACKAGE = "reroll.mixers"


class Rule(Protocol):
    """One rule; `options` is the JSON text of the op."""

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Sequence[Tensor],
        options: str,
        padding: Tensor | None,
    ) -> Tensor:
        """[batch, time, heads, d_v] from a zero state, differentiable."""

    def flops(self, options: str, heads: int, kv_heads: int, d_k: int, d_v: int) -> int:
        """Operations for one more token."""

    def state_bytes(self, options: str, kv_heads: int, d_k: int, d_v: int) -> int:
        """Bytes of state that one sequence holds, whatever its length."""


_rules: dict[str, Rule] = {}


def register_rule(name: str, rule: Rule) -> None:
    """Make `rule` what `recurrence(..., rule=name)` computes."""
    _rules[name] = rule


def find_rule(name: str) -> Rule:
    """The rule of this name; UsageError naming the known ones if there is none."""
    if name not in _rules:
        importlib.import_module(PACKAGE).discover()
    if name not in _rules:
        raise UsageError(
            f"there is no mixer {name!r}",
            where="recurrence",
            hint=f"known: {', '.join(sorted(_rules))}",
        )
    return _rules[name]
