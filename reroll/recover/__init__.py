"""Recovery: a rewritten model gets its quality back by training against its original.

A run is a list of stages, each with its loss, what it trains and its share of the tokens:

    recover("converted/", "recovered/", data=["text/"], recipe="recover", tokens=2e6)
"""

from __future__ import annotations

from reroll.recover.recipe import Recipe, load_recipe
from reroll.recover.run import Report, recover, tensorboard
from reroll.recover.stage import Batch, Models, Stage

__all__ = ["Batch", "Models", "Recipe", "Report", "Stage", "load_recipe", "recover", "tensorboard"]
