"""Passes: what they are made of, and what runs, checks and measures them."""

from reroll.rewrite.pipeline.base import Context, Pass, option

__all__ = ["Context", "Pass", "option"]
