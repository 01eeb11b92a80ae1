"""A Program as text and JSON, and two Programs side by side."""

from reroll.rewrite.ir.text.printer import to_text

__all__ = ["to_text"]
