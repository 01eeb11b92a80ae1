"""Token mixers: recurrences that take the place of attention, one file each.

`make("gla", {"chunk_size": 32})` gives a mixer; `reroll.mixers.base` says what it is.
"""

from reroll.mixers.base import Mixer, State
from reroll.mixers.gates import Gate
from reroll.mixers.registry import discover, find, make, register, registered
from reroll.mixers.trees import Tree

__all__ = ["Gate", "Mixer", "State", "Tree", "discover", "find", "make", "register", "registered"]
