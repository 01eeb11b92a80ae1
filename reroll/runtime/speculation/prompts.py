"""A draft that the model itself makes while it verifies: prompt tokens behind what is read.

Parallel prompt decoding (Chen et al., arXiv 2405.18628), as a chain: a call of the model reads the
last token, the proposed ones, and prompt tokens. If all proposed tokens are right, the logits at
the prompt tokens are proposals for the next call; otherwise they followed wrong tokens, and the
next call has none. Prompt tokens are taken back like wrong tokens, so that no state keeps them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reroll.errors import UsageError
from reroll.rewrite.ir.drafting import PROMPT_WEIGHT
from reroll.runtime.speculation.drafts import Proposal, Wish
from reroll.runtime.speculation.reading import Reading

PROMPTS = "prompts"


class Prompting:
    """Proposes what prompt tokens have predicted in the model's last call."""

    def __init__(self, name: str, model: Reading) -> None:
        """Raises UsageError if the model has no prompt tokens."""
        weights = model.module.program.weights
        if PROMPT_WEIGHT not in weights:
            raise UsageError(
                "the model has no prompt tokens",
                where=f"draft {PROMPTS}",
                hint="the pass prompt_tokens(count=3) adds them, and recovery trains them",
            )
        self.name, self.model = name, model
        self.count = int(weights[PROMPT_WEIGHT].meta.shape[0])
        # how long each row is if all is right that was proposed
        self.expected: list[int] = []

    def propose(self, rows: Sequence[Tensor], wish: Wish) -> Proposal:
        tokens = self._predicted(rows)[:, : wish.count]
        self.expected = [len(row) + tokens.shape[1] + 1 for row in rows]
        self.model.prompts = self.count
        return Proposal(tokens)

    def select(self, rows: Tensor) -> None:
        self.expected = [self.expected[int(row)] for row in rows] if self.expected else []

    def _predicted(self, rows: Sequence[Tensor]) -> Tensor:
        """Return the predictions [rows, n] of the last call; none if all rows had wrong tokens."""
        last = torch.stack([row[-1:] for row in rows])
        # no other draft has been used since
        if self.model.ahead is None or not self.expected:
            return last[:, :0]
        right = [len(row) == length for row, length in zip(rows, self.expected, strict=True)]
        if not any(right):
            return last[:, :0]
        # for a row with wrong tokens, the last token is a guess like any other
        held = torch.tensor(right, device=last.device)[:, None]
        return torch.where(held, self.model.ahead.argmax(-1), last)
