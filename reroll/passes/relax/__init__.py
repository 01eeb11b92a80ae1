"""Parts of the pass `relax`: low-rank factors, and a budget for their ranks."""

from reroll.passes.relax.relax import Relax

__all__ = ["Relax"]
