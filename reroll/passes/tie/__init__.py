"""Share weights between layers."""

from reroll.passes.tie.tie import Tie

__all__ = ["Tie"]
