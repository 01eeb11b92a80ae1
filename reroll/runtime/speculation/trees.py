"""Trees of proposals: several continuations that the model verifies in one step.

Where the draft's first choice is wrong, its second may be right: a tree has both, and what follows
the first. The model reads it with the mask of ancestors and chooses a token, as without a draft, at
the root; as long as a child has this token, it goes on there. So the tokens are the model's own, or
drawn from its distribution, whatever is proposed (SpecInfer, arXiv 2305.09781, with proposals that
nothing was drawn for).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from reroll.errors import UsageError
from reroll.mixers import Tree
from reroll.runtime.speculation.sampling import Sampling, draw

# at so many first positions, a draft's other choices are proposed, too
FORKS = 3


def check_branching(model: Any, rows: int) -> None:
    """Raise UsageError for a model that cannot read a tree of tokens, and for several rows."""
    if rows > 1:
        raise UsageError(
            f"trees are proposed for one row of tokens, and there are {rows}",
            where="branches",
            hint="leave branches at 1, or give each row alone",
        )
    mixing = model._assembly.interface.branching
    if mixing is not None:
        raise UsageError(
            f"the model cannot verify several continuations at once: {mixing} would mix them",
            where="branches",
            hint="leave branches at 1",
        )


def other_choices(proposed: Tensor, choices: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return what a draft might have proposed: its other choices behind the tokens before them.

    `proposed` [n] are the first choices, and `choices` [branches] the best tokens at each of the
    first positions, with the first.
    """
    return tuple(
        torch.cat([proposed[:place], token[None]])
        for place, best in enumerate(choices)
        for token in best
        if token != proposed[place]
    )


def merged(root: Tensor, chains: Sequence[Tensor]) -> tuple[Tensor, Tree]:
    """Put continuations [n] of a token [1] into one tree; common beginnings are shared.

    Returns its tokens [m] and the tree. The token is its root, the first one.
    """
    tokens, parents = [int(root)], [-1]
    children: dict[tuple[int, int], int] = {}
    for chain in chains:
        at = 0
        for token in chain.tolist():
            if (at, token) not in children:
                children[at, token] = len(tokens)
                tokens.append(token)
                parents.append(at)
            at = children[at, token]
    return torch.tensor(tokens, device=root.device), Tree(torch.tensor(parents, device=root.device))


def chosen(
    logits: Tensor, tokens: Tensor, tree: Tree, sampling: Sampling
) -> tuple[Tensor, list[int]]:
    """Return the model's own tokens [k] behind the root, and the path of the k tokens before them.

    `logits` [m, vocabulary] are those of the `tokens` [m] of a tree, whose first is the root.
    """
    numbered = enumerate(zip(tree.parents.tolist(), tokens.tolist(), strict=True))
    children = {edge: number for number, edge in numbered}
    path, new = [0], []
    while True:
        new.append(draw(sampling.distribution(logits[path[-1]][None])))
        child = children.get((path[-1], int(new[-1])))
        if child is None:
            return torch.cat(new), path
        path.append(child)
