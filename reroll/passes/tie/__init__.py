"""Parts of the pass `tie`: blocks of shared weights, and scaling by step."""

from reroll.passes.tie.tie import Tie

__all__ = ["Tie"]
