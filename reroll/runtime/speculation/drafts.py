"""Drafts: what proposes the next tokens, and the state from which it does so.

A draft of the same weights that sees less of the past needs no state of its own where the model's
cache holds what it would keep: it reads the last and the first entries there (`Borrowing`). Others
keep a cache, which goes back to the tokens that were accepted (`Keeping`). `Lookup` proposes what
followed the same tokens before.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from reroll.rewrite.analysis.state_plan import CacheLayer
from reroll.runtime.speculation.sampling import Sampling, draw
from reroll.runtime.state.caches import layers_of
from reroll.runtime.state.growing import GrowingLayer, take_back
from reroll.runtime.state.states import Rewinding, last
from reroll.runtime.state.windows import WindowLayer


class Proposal(NamedTuple):
    """Tokens [1, n], and the distributions [n, vocabulary] that they were drawn from.

    Without distributions, no other tokens could have been proposed.
    """

    tokens: Tensor
    drawn_from: Tensor | None = None


class Draft(Protocol):
    """Proposes tokens that a model may follow its own with."""

    name: str

    def propose(self, tokens: Tensor, count: int, sampling: Sampling) -> Proposal:
        """Propose up to `count` tokens after `tokens` [1, time].

        The last of `tokens` is not in the model's cache yet.
        """


class Lookup:
    """Proposes the tokens that followed the last ones before, in the prompt or the answer.

    Prompt lookup decoding (Saxena 2023): the longest of the last 3 to 2 tokens that came before.
    """

    name = "lookup"
    longest, shortest = 3, 2

    def propose(self, tokens: Tensor, count: int, sampling: Sampling) -> Proposal:
        row = tokens[0]
        for size in range(self.longest, self.shortest - 1, -1):
            if len(row) <= size:
                continue
            same = (row.unfold(0, size, 1)[:-1] == row[-size:]).all(1).nonzero()
            if len(same):
                start = int(same[-1]) + size
                return Proposal(tokens[:, start : start + count])
        return Proposal(tokens[:, :0])


class Borrowing:
    """A draft whose cache is made of entries of the model's cache, anew for each proposal."""

    def __init__(self, name: str, module: Any, cache: Any) -> None:
        self.name, self.module, self.model_cache = name, module, cache

    def propose(self, tokens: Tensor, count: int, sampling: Sampling) -> Proposal:
        cache = DynamicCache(config=self.module.config)
        layers = layers_of(cache, self.module._assembly.layers) or []
        for given, layer in zip(self.model_cache.layers, layers, strict=True):
            _borrow(given, layer)
        return _continued(self.module, cache, tokens, tokens.shape[1] - 1, count, sampling)


class Keeping:
    """A draft with a cache of its own, of the tokens that the model has accepted."""

    def __init__(self, name: str, module: Any) -> None:
        self.name, self.module = name, module
        self.cache = DynamicCache(config=module.config)
        self.cache.activate_past_recording()
        # the tokens in the cache
        self.read: Tensor | None = None

    def propose(self, tokens: Tensor, count: int, sampling: Sampling) -> Proposal:
        read = 0
        if self.read is not None:
            known = min(self.read.shape[1], tokens.shape[1] - 1)
            same = (self.read[0, :known] == tokens[0, :known]).long().cumprod(0)
            read = int(same.sum())
            # with nothing to undo, what was recorded is dropped
            take_back(self.cache, self.read.shape[1] - read)
        proposal = _continued(self.module, self.cache, tokens, read, count, sampling)
        self.read = torch.cat([tokens, proposal.tokens[:, :-1]], 1)
        return proposal


def draft_of(name: str, module: Any, model: Any, cache: Any) -> Draft:
    """Return the draft of a module: without a state of its own if the model's cache has it.

    `cache` is the model's, with all tokens but the last.
    """
    given, wanted = model._assembly.layers, module._assembly.layers
    if len(given) == len(wanted) and all(map(_can_borrow, given, wanted)):
        return Borrowing(name, module, cache)
    return Keeping(name, module)


def read(module: Any, tokens: Tensor, cache: Any, past: int, keep: int = 0) -> Tensor:
    """Return the logits [1, keep, vocabulary] of the last new tokens; all if `keep` is 0."""
    inputs: dict[str, Tensor] = {"input_ids": tokens}
    if any(item.name == "position_ids" for item in module.program.inputs):
        inputs["position_ids"] = torch.arange(past, past + tokens.shape[1], device=tokens.device)[
            None
        ]
    out: Tensor = module(**inputs, past_key_values=cache, logits_to_keep=keep).logits
    return out


def _continued(
    module: Any, cache: Any, tokens: Tensor, past: int, count: int, sampling: Sampling
) -> Proposal:
    """Propose `count` tokens by a module whose cache has read the first `past` of `tokens`."""
    new, proposed, distributions = tokens[:, past:], [], []
    for _ in range(count):
        logits = read(module, new, cache, past, keep=1)[:, -1]
        past += new.shape[1]
        if sampling.temperature is None:
            new = logits.argmax(-1, keepdim=True)
        else:
            distributions.append(sampling.distribution(logits))
            new = draw(distributions[-1])[None]
        proposed.append(new)
    return Proposal(torch.cat(proposed, 1), torch.cat(distributions) if distributions else None)


# ---- entries of another cache


def _can_borrow(given: CacheLayer, wanted: CacheLayer) -> bool:
    """Whether a cache layer of a model holds all that one of a draft would keep."""
    if given == wanted:
        return given.layer_type != "chunked_attention"
    if given.layer_type != "full_attention" or wanted.layer_type != "sliding_attention":
        return False
    sizes = (given.kv_heads, given.head_dim, given.recent)
    return sizes == (wanted.kv_heads, wanted.head_dim, wanted.recent)


def _borrow(given: Any, layer: Any) -> None:
    """Set the state of a draft's cache layer to that of a model's, without copying it."""
    if not given.is_initialized:
        return
    if isinstance(given, Rewinding) and type(given) is type(layer):
        layer.restore(given.snapshot())
    elif isinstance(given, DynamicSlidingWindowLayer):
        for name in ("keys", "values", "cumulative_length"):
            setattr(layer, name, getattr(given, name))
    elif isinstance(layer, WindowLayer):
        _borrow_window(given, layer)
    elif isinstance(layer, DynamicSlidingWindowLayer):
        layer.keys, layer.values = (
            last(x, layer.sliding_window - 1) for x in (given.keys, given.values)
        )
        layer.cumulative_length = given.get_seq_length()
    else:
        layer.keys, layer.values = given.keys, given.values
        if isinstance(layer, GrowingLayer) and isinstance(given, GrowingLayer):
            layer.write_behind(given)
    for name in ("dtype", "device"):
        setattr(layer, name, getattr(given, name))
    layer.is_initialized = True


def _borrow_window(given: Any, layer: WindowLayer) -> None:
    length, count = given.keys.shape[2], max(layer.window - 1, 0)
    start = max(length - count, 0)
    layer.keys, layer.values = given.keys[:, :, start:], given.values[:, :, start:]
    layer.cumulative_length, layer.filled = length, length >= layer.prefix
    if layer.prefix:
        missing = (0, 0, 0, max(layer.prefix - length, 0))
        layer.first_keys, layer.first_values = (
            F.pad(x[:, :, : layer.prefix], missing) for x in (given.keys, given.values)
        )
