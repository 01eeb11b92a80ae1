"""Drafts: what proposes the next tokens, and the state from which it does so.

A draft of the same weights that sees less of the past, or has fewer layers, needs no state of its
own where the model's cache holds what it would keep: it reads these layers there, or the last and
the first entries of them (`Borrowing`). Others
keep a cache, which goes back to the tokens that were accepted (`Keeping`). `Lookup` proposes what
followed the same tokens before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from reroll.rewrite.analysis.state_plan import CacheLayer
from reroll.runtime.speculation.lookup import followed
from reroll.runtime.speculation.reading import Reading, begin
from reroll.runtime.speculation.sampling import GREEDY, Sampling, draw
from reroll.runtime.speculation.sharing import shared_states
from reroll.runtime.speculation.trees import FORKS, other_choices
from reroll.runtime.state.caches import layers_of
from reroll.runtime.state.growing import GrowingLayer
from reroll.runtime.state.states import Rewinding
from reroll.runtime.state.windows import WindowLayer


class Proposal(NamedTuple):
    """Tokens [rows, n], and the distributions [rows, n, vocabulary] that they were drawn from.

    Without distributions, no other tokens could have been proposed. `steps` are those of the draft,
    if they are not as many as the tokens. `others` are further continuations [k] of a single row.
    `likely` [rows, n] are the probabilities that a greedy draft gives its tokens, if it was asked.
    """

    tokens: Tensor
    drawn_from: Tensor | None = None
    steps: int | None = None
    others: tuple[Tensor, ...] = ()
    likely: Tensor | None = None


@dataclass(frozen=True)
class Wish:
    """What is wanted of a draft.

    Attributes:
        count: at most so many tokens.
        sampling: how they are drawn.
        worth: greedy drafting stops where all of its tokens are right with a lower probability than
            this.
        branches: so many tokens are proposed for one place, of a single row.
        right: how often a greedy draft's token is right to which it gives a probability; without
            it, drafting does not stop.
    """

    count: int
    sampling: Sampling = GREEDY
    worth: float = 0.0
    branches: int = 1
    right: Callable[[float], float] | None = None


class Draft(Protocol):
    """Proposes tokens that a model may follow its own with."""

    name: str

    def propose(self, rows: Sequence[Tensor], wish: Wish) -> Proposal:
        """Propose tokens after the tokens [time] of each row.

        The last of them are not in the model's cache yet.
        """

    def select(self, rows: Tensor) -> None:
        """Go on with some rows only."""


class Lookup:
    """Proposes the tokens that followed the last ones before, in the prompt or the answer.

    Prompt lookup decoding (Saxena 2023): the longest of the last 3 to 2 tokens that came before.
    """

    name = "lookup"

    def propose(self, rows: Sequence[Tensor], wish: Wish) -> Proposal:
        matches = [
            [torch.from_numpy(new).to(row.device) for new in _followed(row, wish)] for row in rows
        ]
        found = [each[0] for each in matches]
        count = max(map(len, found))
        # where fewer are found, the rest is a guess like any other
        tokens = [
            F.pad(part, (0, count - len(part)), value=int(row[-1]))
            for part, row in zip(found, rows, strict=True)
        ]
        return Proposal(torch.stack(tokens), others=tuple(matches[0][1:]))

    def select(self, rows: Tensor) -> None:
        pass


def _followed(row: Tensor, wish: Wish) -> list[Any]:
    return followed(row.cpu().numpy(), wish.count, wish.branches)


class Borrowing:
    """A draft whose cache is made of entries of the model's cache, anew for each proposal.

    `places` are the numbers of the model's layers that its own read.
    """

    def __init__(self, name: str, module: Any, model: Reading, places: Sequence[int]) -> None:
        self.name, self.module, self.model, self.places = name, module, model, places

    def propose(self, rows: Sequence[Tensor], wish: Wish) -> Proposal:
        cache = DynamicCache(config=self.module.config)
        layers = layers_of(cache, self.module._assembly.layers) or []
        for place, layer in zip(self.places, layers, strict=True):
            borrow(self.model.cache.layers[place], layer, self.model.mask)
        reading = Reading(self.module, cache, lengths=self.model.lengths, mask=self.model.mask)
        logits = reading.read(torch.stack([row[-1:] for row in rows]), keep=1)
        return continued(reading, logits, wish)

    def select(self, rows: Tensor) -> None:
        pass


class Keeping:
    """A draft with a cache of its own, of the tokens that the model has accepted."""

    def __init__(self, name: str, module: Any) -> None:
        self.name, self.module = name, module
        self.reading: Reading | None = None
        # the tokens that it has read, and how many of them it has proposed last
        self.known: list[Tensor] = []
        self.drafted = 0

    def propose(self, rows: Sequence[Tensor], wish: Wish) -> Proposal:
        if self.reading is None:
            self.reading = begin(self.module, len(rows))
            self.known = [row[:0] for row in rows]
        same = [_common(old, row[:-1]) for old, row in zip(self.known, rows, strict=True)]
        if self.reading.places:
            # with nothing to undo, what was recorded is dropped
            self.reading.take_back([len(old) - n for old, n in zip(self.known, same, strict=True)])
        logits = self.reading.read_rows([row[n:] for row, n in zip(rows, same, strict=True)])
        self.reading.record()
        before = self.reading.places
        proposal = continued(self.reading, logits, wish)
        self.drafted = self.reading.places - before
        self.known = [
            torch.cat([row, new[: self.drafted]])
            for row, new in zip(rows, proposal.tokens, strict=True)
        ]
        return proposal

    def select(self, rows: Tensor) -> None:
        if self.reading is None:
            return
        # afterwards, what was recorded is gone: so what may be wrong goes back before
        self.reading.take_back([self.drafted] * len(self.known))
        self.reading.select(rows)
        self.known = [self.known[n][: len(self.known[n]) - self.drafted] for n in rows.tolist()]
        self.drafted = 0


def draft_of(name: str, module: Any, model: Reading) -> Draft:
    """Return the draft of a module: without a state of its own if the model's cache has it."""
    given, wanted = model.module._assembly.layers, module._assembly.layers
    places = shared_states(model.module, module)
    if places is not None and all(map(can_borrow, [given[n] for n in places], wanted)):
        return Borrowing(name, module, model, places)
    return Keeping(name, module)


def continued(reading: Reading, logits: Tensor, wish: Wish) -> Proposal:
    """Propose tokens behind those that are read, of which `logits` [rows, 1, v] are the last."""
    proposed: list[Tensor] = []
    distributions: list[Tensor] = []
    choices: list[Tensor] = []
    likely: list[Tensor] = []
    right = [1.0] * len(logits)
    steps = 0
    while True:
        steps += 1
        if wish.sampling.temperature is None:
            new = logits[:, -1].argmax(-1, keepdim=True)
            if wish.right is not None:
                sure = logits[:, -1].float().softmax(-1).gather(1, new)
                right = [n * wish.right(p) for n, p in zip(right, sure[:, 0].tolist(), strict=True)]
                if proposed and sum(right) < wish.worth * len(right):
                    break
                likely.append(sure)
        else:
            distributions.append(wish.sampling.distribution(logits[:, -1]))
            new = draw(distributions[-1])[:, None]
        proposed.append(new)
        if wish.branches > 1 and len(choices) < FORKS:
            choices.append(logits[0, -1].topk(wish.branches).indices)
        if len(proposed) >= wish.count:
            break
        logits = reading.read(new, keep=1)
    drawn_from = torch.stack(distributions, 1) if distributions else None
    chains = torch.cat(proposed, 1)
    others = other_choices(chains[0], choices)
    return Proposal(chains, drawn_from, steps, others, torch.cat(likely, 1) if likely else None)


def _common(old: Tensor, new: Tensor) -> int:
    """Return how many first tokens two rows have in common."""
    count = min(len(old), len(new))
    return int((old[:count] == new[:count]).long().cumprod(0).sum())


# ---- entries of another cache


def can_borrow(given: CacheLayer, wanted: CacheLayer) -> bool:
    """Whether a cache layer of a model holds all that one of a draft would keep."""
    if given == wanted:
        return given.layer_type != "chunked_attention"
    if given.layer_type != "full_attention" or wanted.layer_type != "sliding_attention":
        return False
    sizes = (given.kv_heads, given.head_dim, given.recent)
    return sizes == (wanted.kv_heads, wanted.head_dim, wanted.recent)


def borrow(given: Any, layer: Any, mask: Tensor | None) -> None:
    """Set the state of a draft's cache layer to that of a model's, without copying all of it.

    `mask` [rows, places] is False at places of the model's cache that hold nothing.
    """
    if not given.is_initialized:
        return
    if isinstance(given, Rewinding) and type(given) is type(layer):
        layer.restore(given.snapshot())
    elif isinstance(given, DynamicSlidingWindowLayer):
        for name in ("keys", "values", "cumulative_length"):
            setattr(layer, name, getattr(given, name))
    elif isinstance(layer, WindowLayer):
        _borrow_window(given, layer, mask)
    elif isinstance(layer, DynamicSlidingWindowLayer):
        layer.keys, layer.values = _last(given, layer.sliding_window - 1, mask)
        layer.cumulative_length = given.get_seq_length()
        layer.compact = mask is not None
    else:
        layer.keys, layer.values = given.keys, given.values
        if isinstance(layer, GrowingLayer) and isinstance(given, GrowingLayer):
            layer.write_behind(given)
    if getattr(given, "compact", False):
        layer.compact = True
    for name in ("dtype", "device"):
        setattr(layer, name, getattr(given, name))
    layer.is_initialized = True


def _borrow_window(given: Any, layer: WindowLayer, mask: Tensor | None) -> None:
    layer.keys, layer.values = _last(given, max(layer.window - 1, 0), mask)
    length, prefix = given.keys.shape[2], layer.prefix
    layer.cumulative_length, layer.filled = length, length >= prefix
    if mask is not None:
        layer.compact = True
        layer.filled = int(mask.sum(1).min()) >= prefix
    if prefix:
        places = None if mask is None else mask.sort(stable=True, dim=1, descending=True).indices
        missing = (0, 0, 0, max(prefix - length, 0))
        layer.first_keys, layer.first_values = (
            F.pad(x[:, :, :prefix] if places is None else _at(x, places[:, :prefix]), missing)
            for x in (given.keys, given.values)
        )


def _last(given: Any, count: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the last entries of each row of a layer, behind hidden ones if there are fewer."""
    start = max(given.keys.shape[2] - count, 0)
    if mask is None:
        return given.keys[:, :, start:], given.values[:, :, start:]
    places = mask.sort(stable=True, dim=1).indices[:, start:]
    return _at(given.keys, places), _at(given.values, places)


def _at(x: Tensor, places: Tensor) -> Tensor:
    """Take places [rows, n] of entries [rows, heads, time, size]."""
    index = places[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    return x.gather(2, index)
