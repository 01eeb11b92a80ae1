"""Decoding in which tokens of different requests sit at different depths of one batch."""

from reroll.runtime.depthwise.scheduler import DepthScheduler
from reroll.runtime.depthwise.verified import VerifiedScheduler

__all__ = ["DepthScheduler", "VerifiedScheduler"]
