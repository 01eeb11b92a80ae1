"""Parts of `insert_exits`: scores, classifiers, heads of exits, and hiding skipped tokens."""

from reroll.passes.exits.insert_exits import InsertExits

__all__ = ["InsertExits"]
