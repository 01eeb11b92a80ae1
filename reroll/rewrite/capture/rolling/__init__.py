"""Reroll: isomorphic regions become the trips of one loop."""

from reroll.rewrite.capture.rolling.roll import roll_loops

__all__ = ["roll_loops"]
