"""What `insert_exits` is made of: scores, classifiers, heads of exits, and absent tokens."""

from reroll.passes.exits.insert_exits import InsertExits

__all__ = ["InsertExits"]
