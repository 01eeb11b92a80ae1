"""Decoding in which tokens of different requests sit at different depths of one batch."""

from reroll.runtime.depthwise.scheduler import DepthScheduler

__all__ = ["DepthScheduler"]
