"""Give the layers of a shared block a low-rank residual each."""

from reroll.passes.relax.relax import Relax

__all__ = ["Relax"]
