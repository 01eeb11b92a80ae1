"""Run a subject for measures: logits at some positions, in pieces that fit into memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from reroll.evaluate.measure import NotApplicable
from reroll.evaluate.subjects import Subject
from reroll.evaluate.tokenizing import special_ids
from reroll.rewrite.analysis.reach import longest
from reroll.rewrite.analysis.state_plan import plan_states

# the most elements of the logits of one forward: 256 MB in fp32
BUDGET = 2**26
# the most tokens of one forward, so that attention scores have at most CHUNK * context elements
CHUNK = 1024


class Runner:
    """Runs a subject on token ids [rows, time] without padding on the left, and without gradients.

    A context longer than `chunk` goes through the model's own cache, chunk by chunk, if it has one.
    Rows may be padded on the right: tokens there change nothing before them.
    """

    def __init__(
        self,
        subject: Subject,
        other: Subject | None = None,
        *,
        budget: int = BUDGET,
        chunk: int = CHUNK,
    ) -> None:
        """Use the tokenizer of `other` if the subject has none."""
        self.subject = subject
        self.other = other
        self.budget = budget
        self.chunk = chunk
        self.name = subject.name

    @cached_property
    def tokenizer(self) -> Any:
        """Tokenizer of the subject; raises NotApplicable if there is none."""
        tokenizer = self.subject.tokenizer or (self.other and self.other.tokenizer)
        if tokenizer is None:
            raise NotApplicable(f"{self.name} has no tokenizer")
        return tokenizer

    @cached_property
    def prefix(self) -> list[int]:
        """Special tokens that the tokenizer puts before a text."""
        return special_ids(self.tokenizer)[0]

    @cached_property
    def device(self) -> torch.device:
        """Device of the model."""
        weights = next(self.subject.model.parameters(), None)
        return torch.device("cpu") if weights is None else weights.device

    @cached_property
    def limit(self) -> int | None:
        """Longest context that the model's position tables or its configuration allow.

        None if neither gives a limit.
        """
        program = self.subject.program
        if program is not None and (learned := longest(program)) is not None:
            return learned
        config = getattr(self.subject.model, "config", None)
        for name in ("max_position_embeddings", "n_positions"):
            value = getattr(config, name, None)
            if isinstance(value, int) and value > 0:
                return value
        return None

    @cached_property
    def window(self) -> int | None:
        """Number of last tokens that attention sees at most; None if some layer sees all tokens."""
        program = self.subject.program
        layers = () if program is None else plan_states(program).layers
        if not layers or any(layer.size is None for layer in layers):
            return None
        return max(layer.size or 0 for layer in layers)

    def need_generation(self) -> None:
        """Raise NotApplicable unless the model predicts the next token of a text."""
        if not self.subject.generates:
            raise NotApplicable(f"{self.name} does not predict the next token of a text")

    def logits(
        self, ids: Tensor, wanted: Sequence[int] | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield positions and their logits [rows, positions, vocabulary], piece by piece in order.

        `wanted` are positions in ascending order; None is all.
        """
        ids = ids.to(self.device)
        length = ids.shape[1]
        positions = torch.arange(length) if wanted is None else torch.tensor(sorted(wanted))
        cache: Any = None
        start = 0
        while start < length:
            size = self._size(ids.shape[0], positions, start)
            inside = positions[(positions >= start) & (positions < start + size)]
            whole = size >= length and start == 0
            outputs = self.forward(
                ids[:, start : start + size], cache, inside - start, use_cache=not whole
            )
            cache = outputs.get("past_key_values")
            if cache is None and not whole:
                # a model without a cache needs the whole context in one forward
                outputs = self.forward(ids, None, positions, use_cache=False)
                yield positions, _kept(outputs["logits"], positions)
                return
            if len(inside):
                yield inside, _kept(outputs["logits"], inside - start)
            start += size

    def _size(self, rows: int, positions: Tensor, start: int) -> int:
        """Return how many tokens the next forward takes, so that its logits fit the budget."""
        room = max(self.budget // max(rows * self.vocabulary, 1), 1)
        wanted = positions[positions >= start]
        if len(wanted) <= room:
            return self.chunk
        return max(min(self.chunk, int(wanted[room]) - start), 1)

    @cached_property
    def vocabulary(self) -> int:
        """Number of logits at each position."""
        size = getattr(getattr(self.subject.model, "config", None), "vocab_size", None)
        return size if isinstance(size, int) else 2**16

    def forward(self, ids: Tensor, cache: Any, keep: Tensor | int, *, use_cache: bool) -> Any:
        """Run the model once; `keep` are the positions whose logits are requested."""
        accepts = self.subject.accepts
        options: dict[str, Any] = {}
        if "use_cache" in accepts:
            options["use_cache"] = use_cache and getattr(self.subject.model, "keeps_cache", True)
        if cache is not None:
            options["past_key_values"] = cache
        if "logits_to_keep" in accepts:
            none = isinstance(keep, Tensor) and not len(keep)
            # `logits_to_keep` cannot select no position
            options["logits_to_keep"] = 1 if none else keep
        try:
            with torch.inference_mode():
                return self.subject.model(input_ids=ids.to(self.device), **options)
        except (IndexError, RuntimeError) as error:
            raise self.subject.unreachable({"input_ids": ids}) or error from error

    def greedy(self, ids: Tensor, count: int) -> Tensor:
        """Generate `count` tokens greedily [rows, count], ignoring end-of-text tokens."""
        cache: Any = None
        step = ids.to(self.device)
        new: list[Tensor] = []
        for _ in range(count):
            outputs = self.forward(step, cache, 1, use_cache=True)
            cache = outputs.get("past_key_values")
            token = outputs["logits"][:, -1].argmax(-1, keepdim=True)
            new.append(token)
            step = token if cache is not None else torch.cat([step, token], dim=1)
        return torch.cat(new, dim=1).cpu()


def _kept(logits: Tensor, positions: Tensor) -> Tensor:
    """Select the logits at these positions, if the model has returned those at all positions."""
    return logits if logits.shape[1] == len(positions) else logits[:, positions]
