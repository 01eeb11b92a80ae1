"""A cache that knows its tokens, so that a later call reads only what the earlier ones did not.

A model whose cache holds all tokens goes back to any common prefix. State of constant size goes
back to where the prompt or the answer of one of the last calls has ended.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from reroll.runtime.state.growing import GrowingLayer
from reroll.runtime.state.states import restore, snapshot

# how many places can be gone back to
_MARKS = 16


class PrefixCache:
    """The tokens of one row that a lowered model has read, and its cache.

        cache = reroll.PrefixCache(model)
        answer = reroll.generate(model, tokens, cache=cache)
        other = reroll.generate(model, other_tokens, cache=cache)  # reads what is new alone

    Attributes:
        tokens: [time], those in the cache.
        cache: the model's.
    """

    def __init__(self, model: Any) -> None:
        self._config = model.config
        self._forget()

    def _forget(self) -> None:
        self.tokens = torch.empty(0, dtype=torch.long)
        self.cache = DynamicCache(config=self._config)
        self._marks: list[tuple[int, list[Any]]] = []

    def go_back(self, tokens: Tensor) -> int:
        """Go back to a prefix of `tokens` [time], all but the last at most; return its length."""
        known = min(len(self.tokens), len(tokens) - 1)
        same = self.tokens[:known].to(tokens.device) == tokens[:known]
        common = int(same.long().cumprod(0).sum())
        if common == len(self.tokens):
            return common
        while self._marks and self._marks[-1][0] > common:
            self._marks.pop()
        if all(type(layer) is GrowingLayer for layer in self.cache.layers):
            self.cache.crop(common - len(self.tokens))
        elif self._marks:
            common, state = self._marks[-1]
            restore(self.cache, state)
        else:
            self._forget()
        self.tokens = self.tokens[:common]
        return len(self.tokens)

    def mark(self, tokens: Tensor) -> None:
        """Make it possible to go back to here, where the cache has read `tokens` [time]."""
        self.tokens = tokens
        if len(tokens):
            self._marks = [*self._marks[1 - _MARKS :], (len(tokens), snapshot(self.cache))]
