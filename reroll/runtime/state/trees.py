"""A tree of tokens behind a cache: several continuations of one sequence, read in one forward.

`model(input_ids, past_key_values=cache, parents=parents)` reads them, each with its ancestors and
what the cache holds. Cache layers know the tree until `growing.keep` has said which of its tokens
stay: those of one path, from the root on. Attentions then hold these alone, and states of constant
size are computed again from them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from reroll.errors import UsageError
from reroll.mixers import Tree
from reroll.runtime.state.caches import layers_of


def plant(
    model: Any, cache: Any, parents: Any, tokens: Tensor | None, mask: Tensor | None = None
) -> Tree:
    """Tell the layers of a cache that the next tokens [batch, n] are those of a tree.

    `parents` [n] are as in `Tree`, or it is one. Raises UsageError where branches would mix.
    """
    _check(model, cache, mask)
    check_planted(cache)
    tree = parents if isinstance(parents, Tree) else Tree(parents)
    if tokens is not None and tokens.shape[1] != len(tree):
        raise UsageError(
            f"there are {tokens.shape[1]} tokens and {len(tree)} parents", where="parents"
        )
    for layer in layers_of(cache, model._assembly.layers) or []:
        layer.tree = tree
    return tree


def check_planted(cache: Any) -> None:
    """Raise UsageError if a cache has read a tree of which nothing is kept yet."""
    layers = getattr(cache, "layers", ())
    if layers and getattr(layers[0], "tree", None) is not None:
        raise UsageError(
            "the cache has read a tree of tokens",
            where="past_key_values",
            hint="say first which of them stay: reroll.runtime.state.growing.keep",
        )


def tree_positions(model: Any, cache: Any, tree: Tree, given: Tensor | None) -> Tensor | None:
    """Return the positions [1, n] of a tree's tokens, if the model takes any: past + depth."""
    takes = any(item.name == "position_ids" for item in model.program.inputs)
    return tree.depth[None] + int(cache.get_seq_length()) if takes and given is None else given


def _check(model: Any, cache: Any, mask: Tensor | None) -> None:
    problem = None
    if type(cache) is not DynamicCache or cache.offloading:
        problem = f"it needs a DynamicCache on one device, not a {type(cache).__name__}"
    elif model._assembly.interface.branching is not None:
        problem = f"{model._assembly.interface.branching} would mix its branches"
    elif mask is not None and mask.dim() != 2:
        problem = "the attention_mask has a row for each query"
    elif torch.is_grad_enabled() and model.training:
        problem = "the model is being trained"
    if problem is not None:
        raise UsageError(
            f"a tree of tokens cannot be read: {problem}",
            where="parents",
            hint="read a chain: leave parents out",
        )
