"""Raise: idioms of a flat graph become single ops."""

from reroll.rewrite.capture.raising.driver import apply_rule, raise_idioms

__all__ = ["apply_rule", "raise_idioms"]
