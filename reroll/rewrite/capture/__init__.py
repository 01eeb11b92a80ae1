"""Capture: from a transformers model to a flat graph, bit for bit."""

from reroll.rewrite.capture.export import capture, capture_module

__all__ = ["capture", "capture_module"]
