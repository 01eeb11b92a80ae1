"""Passes: what they are made of, and what runs, checks and measures them."""

from reroll.rewrite.passes.base import Context, Pass, option

__all__ = ["Context", "Pass", "option"]
