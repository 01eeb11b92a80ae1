"""The parts of the pass `linearize`: what an attention offers, gates, features, calibration."""

from reroll.passes.linearize.linearize import Linearize

__all__ = ["Linearize"]
