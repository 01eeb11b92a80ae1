"""Trees of tokens: several continuations of one sequence, read at once.

A tree is given by the parent of each token, and tokens come in an order in which parents are before
their children. A token then sees its ancestors and itself where in a sequence it sees all tokens
before it: what decays is summed along its path, and the mask of its ancestors takes the place of
the causal one (SpecInfer, arXiv 2305.09781, for attention; STree, arXiv 2505.14969, for diagonal
recurrences).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from reroll.errors import UsageError


class Tree:
    """Tokens behind a sequence, each of which follows its parent.

    Attributes:
        parents: [n], the number of each token's parent; -1 for the last token of the sequence.
        depth: [n], the number of each token's ancestors in the tree.
        ancestors: [n, n], True in row i at token i and its ancestors.
    """

    def __init__(self, parents: Tensor | Sequence[int]) -> None:
        self.parents = torch.as_tensor(parents, dtype=torch.long)
        if self.parents.dim() != 1 or not len(self.parents):
            raise UsageError(
                f"the parents are a tensor {tuple(self.parents.shape)}, not one of [tokens]",
                where="parents",
            )
        given = self.parents.tolist()
        depth: list[int] = []
        ancestors = torch.eye(len(given), dtype=torch.bool)
        for number, parent in enumerate(given):
            if not -1 <= parent < number:
                raise UsageError(
                    f"the parent of token {number} is {parent}",
                    where="parents",
                    hint="a parent comes before its children; -1 is the last token of the sequence",
                )
            depth.append(0 if parent < 0 else depth[parent] + 1)
            if parent >= 0:
                ancestors[number] |= ancestors[parent]
        device = self.parents.device
        self.depth, self.ancestors = torch.tensor(depth, device=device), ancestors.to(device)
        self.height = max(depth) + 1

    def __len__(self) -> int:
        return len(self.parents)

    @cached_property
    def levels(self) -> list[Tensor]:
        """The tokens of each depth."""
        return [(self.depth == depth).nonzero()[:, 0] for depth in range(self.height)]

    def seen(self, diagonal: int = 0) -> Tensor:
        """Return which tokens each sees: its ancestors, and itself unless `diagonal` is -1."""
        return self.ancestors.tril(diagonal)

    def sums(self, x: Tensor) -> Tensor:
        """Sum `x` [..., time, d] along the path to each token, with its own."""
        result: Tensor = self.ancestors.to(x.dtype) @ x
        return result

    def before(self, distance: int, kept: int) -> Tensor:
        """Return where the token `distance` before each token is: [n].

        It counts from the first of `kept` tokens before the tree; kept >= distance.
        """
        at = torch.arange(len(self), device=self.parents.device)
        for _ in range(min(distance, self.height)):
            at = torch.where(at >= 0, self.parents[at], at)
        inside = self.depth >= distance
        return torch.where(inside, kept + at, kept - distance + self.depth)

    def path(self, token: int) -> list[int]:
        """Return the numbers of a token's ancestors and its own, from the first on."""
        found: list[int] = self.ancestors[token].nonzero()[:, 0].tolist()
        return found

    def repeated(self, times: int) -> Tree:
        """Return the tree in which each token is a chain of so many."""
        first = torch.where(self.parents < 0, -1, self.parents * times + times - 1)
        own = torch.arange(len(self) * times, device=first.device).view(-1, times) - 1
        own[:, 0] = first
        return Tree(own.flatten())
