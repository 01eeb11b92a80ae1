"""Parts of the pass `linearize`: attentions, gates, feature maps, gains, calibration."""

from reroll.passes.linearize.linearize import Linearize

__all__ = ["Linearize"]
