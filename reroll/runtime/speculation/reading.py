"""What a model has read of each row of a batch, and how it reads on and goes back.

Rows that keep different numbers of the tokens that were read part: the entries of dropped tokens
stay in layers that hold all tokens, hidden by the mask, and layers of constant size go back row by
row (`reroll.runtime.state.ragged`). A model that counts places instead of tokens cannot part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from reroll.mixers import Tree
from reroll.rewrite.ir.drafting import PROMPT_TOKENS
from reroll.rewrite.ir.matching import argument
from reroll.rewrite.ir.ops import ATTENTION
from reroll.runtime.speculation.products import FewRows
from reroll.runtime.state.growing import keep
from reroll.runtime.state.ragged import take_back_rows


class Reading:
    """A lowered module, its cache, and which tokens of each row are in it.

    Attributes:
        mask: [rows, places] of the cache, False where nothing is seen; None if all is.
        lengths: [rows], how many tokens of each row are seen.
        prompts: how many prompt tokens the next `read` is to put behind its tokens. They go with
            the next `take_back`, which has to follow.
        ahead: [rows, prompts, vocabulary], the logits at the prompt tokens of the last `read`.
    """

    prompts = 0
    ahead: Tensor | None = None
    # prompt tokens that are in the cache
    _behind = 0

    def __init__(
        self,
        module: Any,
        cache: Any,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> None:
        self.module, self.cache, self.mask = module, cache, mask
        if lengths is None:
            lengths = torch.zeros(1, dtype=torch.long)
        self.lengths = lengths
        self._wants_positions = any(item.name == "position_ids" for item in module.program.inputs)

    @property
    def places(self) -> int:
        """How many places the cache has, with those that are hidden."""
        return int(self.cache.get_seq_length())

    def read(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        keep: int = 0,
        tree: Tree | None = None,
    ) -> Tensor:
        """Read new tokens [rows, n]; return the logits [rows, keep, vocabulary] of the last ones.

        `mask` [rows, n] is False at padding. All logits are returned if `keep` is 0. Tokens of a
        `tree` are to be kept by `keep` afterwards.
        """
        prompts, self.prompts, self.ahead = self.prompts, 0, None
        rows = len(tokens)
        inputs: dict[str, Any] = {}
        if prompts:
            assert mask is None
            assert not keep
            numbers = torch.arange(1, prompts + 1, device=tokens.device).expand(rows, -1)
            inputs[PROMPT_TOKENS] = torch.cat([torch.zeros_like(tokens), numbers.to(tokens)], 1)
            tokens = torch.cat([tokens, torch.zeros_like(numbers).to(tokens)], 1)
        count = tokens.shape[1]
        if self.mask is not None or mask is not None:
            self.mask = torch.cat(
                [
                    _or_ones(self.mask, rows, self.places, tokens.device),
                    _or_ones(mask, rows, count, tokens.device),
                ],
                1,
            )
        inputs["input_ids"] = tokens
        if self.mask is not None:
            inputs["attention_mask"] = self.mask.long()
        new = _or_ones(mask, rows, count, tokens.device).long()
        if self._wants_positions:
            at = new.cumsum(1) - 1 if tree is None else tree.depth
            positions = self.lengths.to(tokens.device)[:, None] + at
            inputs["position_ids"] = positions.clamp(min=0)
        if tree is not None:
            inputs["parents"] = tree
        with FewRows():
            logits: Tensor = self.module(
                **inputs, past_key_values=self.cache, logits_to_keep=keep
            ).logits
        self.lengths = self.lengths + new.sum(1).to(self.lengths.device)
        if prompts:
            self._behind = prompts
            logits, self.ahead = logits[:, :-prompts], logits[:, -prompts:]
        return logits

    def keep(self, path: Sequence[int], of: int) -> None:
        """Keep of the last `of` tokens, a tree, those of a path, in all rows."""
        self.lengths = self.lengths - (of - len(path))
        keep(self.cache, torch.tensor(path, dtype=torch.long), of)
        self.mask = None if self.mask is None else self.mask[:, : self.places]

    def record(self) -> None:
        """From here on, tokens may be taken back."""
        self.cache.activate_past_recording()

    def read_rows(self, rows: Sequence[Tensor], pad: int = 0) -> Tensor:
        """Read new tokens of each row, [n] of at least one; return their last logits [rows, 1, v].

        The first tokens of all may have different lengths. Later, only if the rows can part.
        """
        sizes = [len(row) for row in rows]
        longest = max(sizes)
        if min(sizes) == longest:
            return self.read(torch.stack(list(rows)), keep=1)
        missing = [longest - size for size in sizes]
        first = not self.places
        tokens = torch.stack(
            [
                torch.nn.functional.pad(row, (more, 0) if first else (0, more), value=pad)
                for row, more in zip(rows, missing, strict=True)
            ]
        )
        if first:
            at = torch.arange(longest, device=tokens.device)
            mask = at >= torch.tensor(missing, device=tokens.device)[:, None]
            return self.read(tokens, mask, keep=1)
        logits = self.read(tokens, keep=max(missing) + 1)
        self.take_back(missing)
        ends = torch.tensor([max(missing) - more for more in missing], device=tokens.device)
        return logits[torch.arange(len(sizes), device=tokens.device), ends][:, None]

    def take_back(self, counts: Sequence[int]) -> None:
        """Remove the last tokens of each row, and prompt tokens behind them."""
        counts = [count + self._behind for count in counts]
        self._behind = 0
        places, least = self.places, min(counts)
        if len(set(counts)) > 1 or self.mask is not None:
            device = self.lengths.device if self.mask is None else self.mask.device
            mask = _or_ones(self.mask, len(counts), places, device).clone()
            at = torch.arange(places, device=mask.device)
            mask &= at < (places - torch.tensor(counts, device=mask.device))[:, None]
            self.mask = mask[:, : places - least]
        take_back_rows(self.cache, counts)
        self.lengths = self.lengths - torch.tensor(counts)

    def select(self, rows: Tensor) -> None:
        """Keep some rows only."""
        self.cache.batch_select_indices(rows)
        self.lengths = self.lengths[rows]
        self.mask = None if self.mask is None else self.mask[rows]
        self.ahead = None if self.ahead is None else self.ahead[rows]


def begin(module: Any, rows: int) -> Reading:
    """Return what a module has read before the first token."""
    cache = DynamicCache(config=module.config)
    return Reading(module, cache, lengths=torch.zeros(rows, dtype=torch.long))


def can_part(module: Any) -> bool:
    """Whether rows of a batch may keep different numbers of tokens.

    Its positions are given, so that hidden entries do not count, and nothing else counts places:
    neither a bias of attention nor chunks.
    """
    if not any(item.name == "position_ids" for item in module.program.inputs):
        return False
    if any(layer.layer_type == "chunked_attention" for layer in module._assembly.layers):
        return False
    graphs = [module.program.graph, *(body.graph for body in module.program.bodies.values())]
    attentions = (n for g in graphs for n in g.nodes if n.target is ATTENTION)
    return all(argument(node, "bias") is None for node in attentions)


def _or_ones(mask: Tensor | None, rows: int, count: int, device: Any) -> Tensor:
    return torch.ones(rows, count, dtype=torch.bool, device=device) if mask is None else mask
